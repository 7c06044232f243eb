"""Hugging Face data sets: what save_to_disk writes, the files of a hub repository in a folder, and hub ids."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipelines.images.files import Files
from pipelines.images.sources.arrow import ArrowSource
from pipelines.images.sources.columns import ColumnSource
from pipelines.images.sources.parquet import ParquetSource
from pipelines.images.sources.webdataset import WebDatasetSource
from pipelines.images.splits import ALL, WORDS, pick_split, split_of

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
README = "README.md"
SUFFIXES = (".parquet", ".arrow", ".tar")


def open_folder(files: Files, config: "ImagesConfig") -> ColumnSource | WebDatasetSource:
    """The wanted part of a data set that save_to_disk wrote, or of the files of a hub repository."""
    names = files.top()[1]
    if SAVED_SPLITS in names:
        parts = json.loads(files.read(SAVED_SPLITS))["splits"]
        if config.split == ALL:
            raise ValueError(
                f'images.split: found "{ALL}", expected one of the parts of {files.root}: {", ".join(parts)}; set '
                "images.split to one of them"
            )
        files = files.below(pick_split(parts, config.split, files.root)[0])
        names = files.top()[1]
    if SAVED in names:
        saved = json.loads(files.read(SAVED))
        return ArrowSource(files, config, [entry["filename"] for entry in saved["_data_files"]])
    return _open_repository(files, config, files.listing()[0])


def _open_repository(files: Files, config: "ImagesConfig", names: Sequence[str]) -> ColumnSource | WebDatasetSource:
    card = read_card(files.read(README)) if README in names else {}
    chosen = choose_files(names, card, config, files.root)
    kinds = sorted({name[name.rindex(".") :] for name in chosen})
    if len(kinds) != 1:
        raise ValueError(
            f"images.path: found files of several kinds in {files.root} ({', '.join(kinds)}), expected one; set "
            "images.path to the folder of one of them"
        )
    if kinds == [".tar"]:
        return WebDatasetSource(files, config, chosen)
    source = ParquetSource if kinds == [".parquet"] else ArrowSource
    return source(files, config, chosen, class_names_in(card, config.subset))


def read_card(data: bytes) -> dict[str, Any]:
    """The YAML block that a repository's README may begin with."""
    import yaml

    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", data.decode(errors="replace"), re.DOTALL)
    card = yaml.safe_load(block[1]) if block else None
    return card if isinstance(card, dict) else {}


def choose_files(names: Sequence[str], card: dict, config: "ImagesConfig", where: str) -> list[str]:
    """The files of the wanted subset and split: as the card says, else by the words in their names."""
    data = [name for name in names if name.endswith(SUFFIXES)]
    if not data:
        raise FileNotFoundError(
            f"images.path: found no Parquet, Arrow or tar files in {where}, expected a data set of them; for folders "
            'of images set images.path to a copy on disk, and images.format = "folder"'
        )
    entry = _subset(card.get("configs") or [], config.subset, where)
    if entry is not None and "data_files" in entry:
        return _listed(data, entry, config.split, where)
    folders = {name.partition("/")[0] for name in data if "/" in name and not split_of(name.partition("/")[0])}
    if config.subset is not None:
        data = [name for name in data if name.startswith(f"{config.subset}/")]
    if not data or (config.subset is None and len(folders) > 1):
        raise ValueError(
            f"images.subset: found {config.subset!r}, expected one of the folders of {where}: "
            f"{', '.join(sorted(folders))}; set images.subset to one of them"
        )
    return pick_split(data, config.split, where)


def _subset(entries: list[dict], wanted: str | None, where: str) -> dict | None:
    """The card's entry of a subset; the default one, or the only one, when none is asked for."""
    named = {entry.get("config_name", "default"): entry for entry in entries}
    if not named:
        return None
    default = next((name for name, entry in named.items() if entry.get("default")), "default")
    name = wanted or (default if default in named else next(iter(named)) if len(named) == 1 else None)
    if name not in named:
        raise ValueError(
            f"images.subset: found {wanted!r}, expected one of the subsets of {where}: {', '.join(named)}; set "
            "images.subset to one of them"
        )
    return named[name]


def _listed(data: list[str], entry: dict, split: str, where: str) -> list[str]:
    """Files that the patterns of a card's `data_files` name for a split."""
    files = entry["data_files"]
    listed = files if isinstance(files, list) else [files]
    patterns: dict[str, list[str]] = {}
    for item in listed:
        part, paths = (item.get("split", "train"), item["path"]) if isinstance(item, dict) else ("train", item)
        patterns.setdefault(part, []).extend([paths] if isinstance(paths, str) else paths)
    wanted = (
        list(patterns)
        if split == ALL
        else [part for part in patterns if WORDS.get(part, part) == WORDS.get(split, split)]
    )
    folder = f"{entry['data_dir'].strip('/')}/" if entry.get("data_dir") else ""
    expressions = [_expression(folder + pattern) for part in wanted for pattern in patterns[part]]
    chosen = [name for name in data if any(expression.fullmatch(name) for expression in expressions)]
    if not chosen:
        raise ValueError(
            f"images.split: found {split!r}, for which {where} has no files; expected one of {', '.join(patterns)}: "
            "set images.split to one of them"
        )
    return pick_split(chosen, ALL, where)


def _expression(pattern: str) -> re.Pattern:
    """A shell pattern of a path, in which ** stands for any folders."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile(
        "".join(tokens.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    )


def class_names_in(card: dict, subset: str | None) -> dict[str, tuple[str, ...]]:
    """Class names by column, as a card's `dataset_info` gives them: {"0": "cat", "1": "dog"}."""
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


def is_hub_id(path: str) -> bool:
    """Whether a path that is not on disk can be OWNER/NAME or OWNER/NAME@REVISION."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", path) is not None


def open_hub(config: "ImagesConfig") -> ColumnSource | WebDatasetSource:
    """The wanted part of a data set on the hub, downloaded into the cache of huggingface_hub."""
    return open_folder(Files(_download(config)), config)


def pinned(config: "ImagesConfig") -> str:
    """OWNER/NAME@COMMIT of what this process has listed: a branch on the hub may move on while others read."""
    folder = _download(config)  # .../snapshots/COMMIT
    return f"{config.path.partition('@')[0]}@{os.path.basename(folder)}"


@lru_cache(maxsize=4)
def _download(config: "ImagesConfig") -> str:
    """Folder with the README and the wanted files. Without network, what an earlier download left."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    name, _, revision = config.path.partition("@")
    place: dict[str, Any] = {"repo_id": name, "repo_type": "dataset", "revision": revision or None}
    try:
        info = HfApi().dataset_info(name, revision=revision or None)
    except Exception as error:
        return _downloaded_earlier(place, error)
    # Not by info.sha from here on: the cache notes the commit of a branch only where it is asked for by the branch, and
    # without that note nothing is found when there is no network.
    names = [sibling.rfilename for sibling in info.siblings or []]
    card = {}
    if README in names:
        with open(hf_hub_download(filename=README, **place), "rb") as file:
            card = read_card(file.read())
    chosen = choose_files(names, card, config, f"{name} on the Hugging Face hub")
    patterns = [re.sub(r"([*?\[])", r"[\1]", file) for file in (README, *chosen)]
    return snapshot_download(allow_patterns=patterns, **place)


def _downloaded_earlier(place: dict[str, Any], error: Exception) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(allow_patterns=[README], local_files_only=True, **place)
    except Exception:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"images.path: found no folder {place['repo_id']}, and the Hugging Face hub does not give a data set of "
            f"this name ({type(error).__name__}: {reason}); expected a folder, or a hub id with a network to reach it. "
            "Check the spelling, log in for a gated data set, or copy its files here and set images.path to the copy"
        ) from error
