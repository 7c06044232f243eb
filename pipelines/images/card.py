"""What Hugging Face data sets declare beside their files: the card in README.md, and dataset_infos.json."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pipelines.images.files import Files
from raydit.errors import InvalidInput

README = "README.md"
INFOS = ("dataset_infos.json", "dataset_info.json")
"""Files of older data sets: features by subset, or those of the only one."""


def read_card(data: bytes) -> dict[str, Any]:
    """Return the YAML block at the start of a repository's README; empty if it has none."""
    import yaml

    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", data.decode(errors="replace"), re.DOTALL)
    card = yaml.safe_load(block[1]) if block else None
    return card if isinstance(card, dict) else {}


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
            yield (
                feature["name"],
                tuple(names[key] for key in sorted(names, key=int)) if isinstance(names, dict) else tuple(names),
            )


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
        found |= class_names_in(read_card(files.read(README)), subset)
    return found


def _classes_in_infos(files: Files, name: str, subset: str | None) -> dict[str, tuple[str, ...]]:
    try:
        content = json.loads(files.read(name))
        infos = [content] if "features" in content else [content[key] for key in content if subset in (None, key)]
        features = [(column, kind) for info in infos for column, kind in (info.get("features") or {}).items()]
        return {
            column: tuple(kind.get("names") or ())
            for column, kind in features
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(
            f"images.path: {files.path(name)}: found no description of a data set ({error})",
            "the JSON that Hugging Face's datasets writes",
            "correct or remove the file",
        ) from error
