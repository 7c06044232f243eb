"""Hugging Face data sets: folders that save_to_disk writes, folders laid out as a hub repository, and hub ids."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster import storage
from dit.hub import REVISION
from pipelines.images.claimed_sizes import explain_broken
from pipelines.images.dataset_card import INFOS, README, class_names_in, explain_card, read_card
from pipelines.images.decoding import is_image
from pipelines.images.globs import match_any
from pipelines.images.source_files import Files, ImagesPath, enter_folder
from pipelines.images.sources.arrow import ArrowSource
from pipelines.images.sources.columns import ColumnSource
from pipelines.images.sources.parquet import ParquetSource
from pipelines.images.sources.table import USUAL_NAMES
from pipelines.images.sources.webdataset import WebDatasetSource, refuse_compressed
from pipelines.images.splits import (
    ALL_SPLITS,
    SPLIT_OF_WORD,
    canonical_split,
    describe_files,
    describe_subset,
    describe_wanted,
    pick_split,
    split_of,
)
from raydit.errors import InvalidInput, NotFound
from raydit.listed_names import require_all_inside, require_inside

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that save_to_disk writes for a data set, and for one with several splits."""
SUFFIXES = (".parquet", ".arrow", ".tar")


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a folder that save_to_disk wrote, or a repository with its data in subfolders."""
    if path.name is not None:
        return False
    if {SAVED, SAVED_SPLITS} & set(path.names):
        return True
    has_data = any(is_image(name) or name in USUAL_NAMES or name.endswith((".parquet", ".tar")) for name in path.names)
    return not has_data and _hold_data_files(path.files, path.folders)


def _hold_data_files(files: Files, folders: list[str], parents: tuple[str, ...] = ()) -> bool:
    """Return whether folders hold Parquet or tar files and no images; the first folder with either decides.

    parents: real paths of the folders above `files`, on disk. Raises InvalidInput for a link to one of them.
    """
    if files.is_local:
        parents = enter_folder(storage.local_path(files.root), parents)
    for folder in sorted(folders, key=lambda folder: folder != "data"):
        subfolders, names = files.subfolder(folder).list_top()
        if any(map(is_image, names)):
            return False
        if any(name.endswith((".parquet", ".tar")) for name in names):
            return True
        if _hold_data_files(files.subfolder(folder), subfolders, parents):
            return True
    return False


def open_dataset(path: ImagesPath, config: "ImagesConfig") -> ColumnSource | WebDatasetSource:
    """Open the wanted split of a folder that save_to_disk wrote, or of the files of a hub repository."""
    return _open_files(path.require_folder("huggingface"), config)


def _open_files(files: Files, config: "ImagesConfig") -> ColumnSource | WebDatasetSource:
    names = files.list_top()[1]
    notes: tuple[str, ...] = ()
    divided = SAVED_SPLITS in names
    if divided:
        splits = _field(files, SAVED_SPLITS, "splits", str)
        if config.split == ALL_SPLITS:
            raise InvalidInput(
                f'images.split: found "{ALL_SPLITS}"',
                f"one of the splits of {files.root}: {', '.join(splits)}",
                "set images.split to one of them",
            )
        earlier = config.reading is not None
        chosen = pick_split(splits, config.split, files.root, earlier=earlier)[0]
        notes = describe_files(splits, [chosen], config.split)
        require_inside(chosen, files.path(SAVED_SPLITS))
        with explain_broken(f"{files.root}/{chosen}", "split", "a folder for each split", files.is_local):
            files = files.subfolder(chosen)
            names = files.list_top()[1]
    if SAVED in names:
        saved = [entry.get("filename") for entry in _field(files, SAVED, "_data_files", dict)]
        undivided = None if divided else str(files.read_json(SAVED).get("_split") or "")
        names = require_all_inside(saved, files.path(SAVED))
        return ArrowSource(files, config, names, notes=notes, undivided=undivided)
    return _open_repository(files, config, files.list_all()[0])


def _field(files: Files, name: str, field: str, kind: type) -> list[Any]:
    """Return a list of values of one type from a JSON file of save_to_disk. Raises InvalidInput if it has none."""
    content = files.read_json(name)
    found = content.get(field) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        raise InvalidInput(
            f"images.path: {files.path(name)}: found no list {field!r}",
            "the file that save_to_disk writes",
            "copy it again",
        )
    return found


def _open_repository(files: Files, config: "ImagesConfig", names: Sequence[str]) -> ColumnSource | WebDatasetSource:
    where = f"images.path: {files.path(README)}"
    card = read_card(files.read_named(README), where) if README in names else {}
    chosen = choose_files(names, card, config, files.root)
    kinds = sorted({name[name.rindex(".") :] for name in chosen})
    if len(kinds) != 1:
        raise InvalidInput(
            f"images.path: found files of several kinds in {files.root} ({', '.join(kinds)})",
            "one kind",
            "set images.path to the folder of one of them",
        )
    notes = _describe_left_out([name for name in names if name.endswith(SUFFIXES)], chosen, card, config)
    if kinds == [".tar"]:
        return WebDatasetSource(files, config, chosen, notes)
    source = ParquetSource if kinds == [".parquet"] else ArrowSource
    with explain_card(where):
        class_names = class_names_in(card, config.subset)
    return source(files, config, chosen, class_names, notes)


def _describe_left_out(data: list[str], chosen: Sequence[str], card: dict, config: "ImagesConfig") -> tuple[str, ...]:
    """Return what to say about the data files that were not chosen, because of their subset or of their split."""
    inside, subset = data, config.subset or ""
    try:
        with explain_card("the card"):
            entry = _find_subset(card.get("configs") or [], config.subset, "")
            if entry is not None and "data_files" in entry:
                subset = str(entry.get("config_name", "default"))
                inside = list(filter(_match_splits(_patterns_by_split(entry), entry, ""), data))
            elif subset:
                inside = [name for name in data if name.startswith(f"{subset}/")]
    except InvalidInput:  # unusable patterns of a split that was not asked for
        inside = data
    return (*describe_subset(data, inside, subset), *describe_files(inside, chosen, config.split))


def choose_files(names: Sequence[str], card: dict, config: "ImagesConfig", where: str) -> list[str]:
    """Return the files of the wanted subset and split, by the data set's card or else by the words in their names.

    where: the data set, for messages. Raises NotFound if there are no data files, and InvalidInput if the subset or
    split does not exist or must be chosen.
    """
    data = [name for name in names if name.endswith(SUFFIXES)]
    if not data:
        refuse_compressed(names, where)
        raise NotFound(
            f"images.path: found no Parquet, Arrow or tar files in {where}",
            "a data set of them",
            'for folders of images set images.path to a copy on disk, and images.format = "folder"',
        )
    with explain_card(f"images.path: the card of {where}"):
        entry = _find_subset(card.get("configs") or [], config.subset, where)
        if entry is not None and "data_files" in entry:
            return _pick_by_card(data, entry, config, where)
    folders = {
        name.partition("/")[0]
        for name in data
        if "/" in name and not split_of(name.partition("/")[0], earlier=config.reading is not None)
    }
    if config.subset is not None:
        data = [name for name in data if name.startswith(f"{config.subset}/")]
    if not data or (config.subset is None and len(folders) > 1):
        raise InvalidInput(
            f"images.subset: found {config.subset!r}",
            f"one of the folders of {where}: {', '.join(sorted(folders))}",
            "set images.subset to one of them",
        )
    return pick_split(data, config.split, where, earlier=config.reading is not None)


def _find_subset(entries: list[dict], wanted: str | None, where: str) -> dict | None:
    """Return the card's entry of a subset: the wanted one, or else the default or only one."""
    named = {entry.get("config_name", "default"): entry for entry in entries}
    if not named:
        return None
    default = next((name for name, entry in named.items() if entry.get("default")), "default")
    name = wanted or (default if default in named else next(iter(named)) if len(named) == 1 else None)
    if name not in named:
        raise InvalidInput(
            f"images.subset: found {wanted!r}",
            f"one of the subsets of {where}: {', '.join(named)}",
            "set images.subset to one of them",
        )
    return named[name]


def _pick_by_card(data: list[str], entry: dict, config: "ImagesConfig", where: str) -> list[str]:
    """Return the files that match the patterns of a card's `data_files` for a split."""
    split, patterns = config.split, _patterns_by_split(entry)
    canonical = SPLIT_OF_WORD.get(split, split)
    wanted = [name for name in patterns if split == ALL_SPLITS or SPLIT_OF_WORD.get(name, name) == canonical]
    if not wanted and config.reading is None:
        wanted = [name for name in patterns if canonical_split(name) == canonical_split(split)]
    matches = _match_splits({name: patterns[name] for name in wanted}, entry, f"images.path: the card of {where}")
    chosen = list(filter(matches, data))
    if not chosen:
        raise InvalidInput(
            f"images.split: found {describe_wanted(split)}, for which {where} has no files",
            f"one of {', '.join(patterns)}",
            "set images.split to one of them",
        )
    return pick_split(chosen, ALL_SPLITS, where)


def _patterns_by_split(entry: dict) -> dict[str, list[str]]:
    """Return the patterns of a card's `data_files` by the names of their splits."""
    files = entry["data_files"]
    patterns: dict[str, list[str]] = {}
    for item in files if isinstance(files, list) else [files]:
        name, paths = (item.get("split", "train"), item["path"]) if isinstance(item, dict) else ("train", item)
        patterns.setdefault(name, []).extend([paths] if isinstance(paths, str) else paths)
    return patterns


def _match_splits(patterns: Mapping[str, Sequence[str]], entry: dict, where: str) -> Callable[[str], bool]:
    """Return a function that tells whether a file matches a pattern of any of some splits of a card's entry."""
    folder = f"{entry['data_dir'].strip('/')}/" if entry.get("data_dir") else ""
    return match_any([folder + pattern for globs in patterns.values() for pattern in globs], where)


def is_hub_id(path: str) -> bool:
    """Return whether a path has the form OWNER/NAME or OWNER/NAME@REVISION."""
    return re.fullmatch(rf"[\w-][\w.-]*/[\w.-]+(@{REVISION})?", path) is not None


def open_hub(config: "ImagesConfig") -> ColumnSource | WebDatasetSource:
    """Download the wanted files of a data set on the hub into huggingface_hub's cache, and open them."""
    download = _download(config)
    source = _open_files(Files(download.folder), config)
    source.notes = (*download.notes, *source.notes)
    return source


def pin_revision(config: "ImagesConfig") -> str:
    """Return OWNER/NAME@COMMIT of the version that this process has listed; a branch may change meanwhile."""
    folder = _download(config).folder  # .../snapshots/COMMIT
    return f"{config.path.partition('@')[0]}@{os.path.basename(folder)}"


class Download(NamedTuple):
    """A data set of the hub on this machine."""

    folder: str
    """Folder with its README and the wanted files."""
    notes: tuple[str, ...] = ()
    """Notices for the user about these files, as sentences."""


@lru_cache(maxsize=4)
def _download(config: "ImagesConfig") -> Download:
    """Download the README and the wanted files of a data set; without a network, find those downloaded earlier."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    name, _, revision = config.path.partition("@")
    repository: dict[str, Any] = {"repo_id": name, "repo_type": "dataset", "revision": revision or None}
    try:
        info = HfApi().dataset_info(name, revision=revision or None)
    except Exception as error:
        return _find_earlier_download(repository, error)
    # The revision stays the branch and does not become info.sha: only requests by branch let the cache record the
    # branch's commit, without which nothing is found when there is no network.
    names = [sibling.rfilename for sibling in info.siblings or []]
    card = {}
    if README in names:
        with open(hf_hub_download(filename=README, **repository), "rb") as file:
            card = read_card(file.read(), f"{README} of {name}")
    chosen = choose_files(names, card, config, f"{name} on the Hugging Face hub")
    patterns = [re.sub(r"([*?\[])", r"[\1]", file) for file in (README, *INFOS, *chosen)]
    return Download(snapshot_download(allow_patterns=patterns, **repository))


def _find_earlier_download(repository: dict[str, Any], error: Exception) -> Download:
    from huggingface_hub import snapshot_download

    reason = (str(error).strip().splitlines() or [""])[0]
    try:
        folder = snapshot_download(allow_patterns=[README], local_files_only=True, **repository)
        note = (
            f"the files are those of {repository['repo_id']} that were downloaded earlier, perhaps not all of them, "
            f"because the Hugging Face hub could not be asked ({type(error).__name__}: {reason})"
        )
        return Download(folder, (note,))
    except Exception:
        raise NotFound(
            f"images.path: found no folder {repository['repo_id']}, and no data set of this name could be fetched from "
            f"the Hugging Face hub ({type(error).__name__}: {reason})",
            "a folder, or a hub id and a network",
            "check the spelling, log in for a gated data set, or copy its files here and set images.path to the copy",
        ) from error
