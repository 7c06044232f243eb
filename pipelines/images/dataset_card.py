"""What Hugging Face data sets declare beside their files: the card in README.md, and dataset_infos.json."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.images.labels import is_unicode
from pipelines.images.source_files import Files
from pipelines.images.yaml_block import MAX_CARD_BYTES, YamlError, load_yaml
from raydit.errors import InvalidInput, RayditError

README = "README.md"
INFOS = ("dataset_infos.json", "dataset_info.json")
"""Files of older data sets: features by subset, or those of the only one."""


def read_card(data: bytes, where: str) -> dict[str, Any]:
    """Return the YAML block at the start of a repository's README; empty if it has none.

    where: the file, for messages. Raises InvalidInput if the block is longer than MAX_CARD_BYTES, or no YAML.
    """
    block = _first_block(data)
    if len(block) > MAX_CARD_BYTES:
        raise InvalidInput(
            f"{where}: found a card of {len(block):,} bytes", f"at most {MAX_CARD_BYTES:,}", "shorten or remove it"
        )
    try:
        card = load_yaml(block.decode(errors="replace"))
    except YamlError as error:
        raise InvalidInput(f"{where}: found no YAML in its card ({error})", "", "correct or remove the card") from error
    return card if isinstance(card, dict) else {}


def _first_block(data: bytes) -> bytes:
    """Return what is between the line "---" at the start of a text and the next such line; empty if there is none."""
    begin = data.find(b"\n") + 1
    if not data.startswith(b"---") or data[3:begin].strip():
        return b""
    end = begin
    while (end := data.find(b"\n---", end)) >= 0:
        line_end = data.find(b"\n", end + 1)
        if not data[end + 4 : None if line_end < 0 else line_end].strip():
            return data[begin:end]
        end += 4
    return b""


@contextmanager
def explain_card(where: str) -> Iterator[None]:
    """Replace what Python raises for values of other types than a card should have. where: the card, for messages."""
    try:
        yield
    except RayditError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{where}: found no description of a data set ({type(error).__name__}: {error})",
            "the fields that Hugging Face documents",
            "correct or remove the file",
        ) from error


def class_names_in(card: dict, subset: str | None) -> dict[str, tuple[str, ...]]:
    """Return the class names of each column that a card's `dataset_info` gives as {"0": "cat", "1": "dog"}."""
    infos = card.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    found = {}
    for info in infos:
        if subset in (None, info.get("config_name", subset)):
            for column, names in _class_labels(info.get("features") or []):
                found[column] = names
    return found


def _class_labels(features: list[dict]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for feature in features:
        kind = feature.get("dtype")
        if isinstance(kind, dict) and "class_label" in kind:
            names = kind["class_label"].get("names") or {}
            listed = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
            yield feature["name"], _checked_names(listed)


def _checked_names(names: Sequence[str | int | float]) -> tuple[str, ...]:
    """Return class names as texts: YAML reads the name 5 as a number.

    Raises TypeError for anything else, also for truth values, as which YAML reads the names yes, no, on and off, and
    ValueError for a text that is not Unicode.
    """
    if any(isinstance(name, bool) for name in names):
        raise TypeError("a class name is read as true or false: quote the names")
    if not all(isinstance(name, (str, int, float)) for name in names):
        raise TypeError("class names must be texts: quote the names")
    texts = tuple(map(str, names))
    if not all(map(is_unicode, texts)):
        raise ValueError("class names must be Unicode")
    return texts


def declared_classes(files: Files, subset: str | None) -> dict[str, tuple[str, ...]]:
    """Return the class names of each column that the files of a folder declare as class labels; empty if none do.

    Raises InvalidInput if one of them cannot be read.
    """
    names = files.list_top()[1]
    found: dict[str, tuple[str, ...]] = {}
    for name in INFOS:
        if name in names:
            found |= _classes_in_infos(files, name, subset)
    if README in names:
        where = f"images.path: {files.path(README)}"
        card = read_card(files.read_named(README), where)
        with explain_card(where):
            found |= class_names_in(card, subset)
    return found


def _classes_in_infos(files: Files, name: str, subset: str | None) -> dict[str, tuple[str, ...]]:
    content = files.read_json(name)
    with explain_card(f"images.path: {files.path(name)}"):
        infos = [content] if "features" in content else [content[key] for key in content if subset in (None, key)]
        features = [(column, kind) for info in infos for column, kind in (info.get("features") or {}).items()]
        return {
            column: _checked_names(kind.get("names") or ())
            for column, kind in features
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
