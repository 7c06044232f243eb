"""Image files in folders: a folder for each class, or one folder of images without classes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.images.decoding import OTHER_PICTURES, SUFFIXES, is_image, try_decode
from pipelines.images.labels import number_labels
from pipelines.images.listing import Listing, Locations
from pipelines.images.source_files import Files, ImagesPath
from pipelines.images.sources.webdataset import refuse_compressed
from pipelines.images.splits import (
    ALL_SPLITS,
    SPLIT_OF_WORD,
    SplitLayout,
    find_split_layout,
    pick_images,
    pick_split,
    refuse_absent_split,
)
from pipelines.images.unused_settings import note_unused
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a folder; this format is tried after all others."""
    return path.name is None


def open_folder(path: ImagesPath, config: "ImagesConfig") -> "FolderSource":
    """Open a folder of images, or of class folders."""
    return FolderSource(path.require_folder("folder"), config)


class FolderSource:
    """A folder for each class (its sorted names are the classes), or one folder of images without classes.

    Keys are file names relative to the root. If the folders are splits of a data set (train, val, test), the wanted one
    holds the class folders; if each class folder holds such folders, the wanted one of each holds its images.
    """

    def __init__(self, files: Files, config: "ImagesConfig"):
        self.files, self.config = files, config
        self.earlier = config.reading is not None

    def listing(self) -> Listing:
        names, sizes = self.files.list_all()
        shown = np.flatnonzero([is_image(name, earlier=self.earlier) for name in names])
        keys = [names[index] for index in shown]
        if not keys:
            refuse_compressed(names, self.files.root)
            raise NotFound(
                f"images.path: found no images in {self.files.root}",
                f"files ending in {', '.join(sorted(SUFFIXES))}, in a folder for each class or all in one",
                "correct images.path, or set images.format",
            )
        inside, depth, notes = self._pick_split(keys)
        all_keys, keys, shown = keys, [keys[index] for index in inside], shown[inside]
        labels, class_names = self._labels(keys, depth) if depth is not None else (np.zeros(len(keys), np.int32), ())
        if class_names and depth is not None:
            notes = (*notes, *self._note_empty_folders(all_keys, keys, depth))
        others = Counter(suffix for name in names if (suffix := name[name.rfind(".") :].lower()) in OTHER_PICTURES)
        if others and not self.earlier:
            counted = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
            notes = (*notes, f"left out, because raydit reads no such files: {counted}")
        tables = [] if class_names else [name for name in names if name.endswith((".csv", ".tsv", ".jsonl"))]
        if tables and not self.earlier:
            notes = (*notes, f"{tables[0]} is not read: set images.path to it if it names the images and their labels")
        notes = (*notes, *note_unused(self.config, f"the image files in {self.files.root}"))
        return Listing(keys, labels, sizes[shown], class_names, notes=notes, root=self.files.root)

    def _pick_split(self, keys: list[str]) -> tuple[Sequence[int], int | None, tuple[str, ...]]:
        """Return the positions of the images of the wanted split, the level of class folders, and what to say of it.

        The level is None if there are no class folders.
        """
        layout = self._earlier_layout(keys) if self.earlier else find_split_layout(keys)
        if layout is None:
            refuse_absent_split(self.config, self.files.root)
            return range(len(keys)), 0, ()
        folders = [key.split("/", layout.level + 1)[layout.level] for key in keys]
        if self.earlier:
            wanted = set(pick_split(sorted(layout.splits), self.config.split, self.files.root, earlier=True))
            return [index for index, folder in enumerate(folders) if folder in wanted], layout.label_level, ()
        if self.config.split == ALL_SPLITS:
            if layout.have_class_folders(keys):
                return range(len(keys)), layout.label_level, ()
            return range(len(keys)), None, ("there are no classes, because some splits have no class folders",)
        inside, notes = pick_images(folders, layout.splits, self.config.split, self.files.root)
        return inside, layout.label_level, notes

    def _note_empty_folders(self, all_keys: list[str], keys: list[str], depth: int) -> tuple[str, ...]:
        """Say which folders beside those of the classes contain no images: they are not counted as classes.

        all_keys: the images of all splits. depth: level of class folders.
        """
        if self.config.class_names:
            return ()
        parents = sorted({"/".join(key.split("/")[:depth]) for key in keys})
        used = {"/".join(key.split("/")[: depth + 1]) for key in all_keys}
        beside = [f"{parent}/{name}".lstrip("/") for parent in parents for name in self._folders_in(parent)]
        empty = [folder for folder in beside if folder not in used]
        if not empty:
            return ()
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        many = "folders contain no images and are not counted as classes"
        said = many if len(empty) > 1 else "folder contains no images and is not counted as a class"
        return (f"{len(empty)} {said} ({shown})",)

    def _folders_in(self, parent: str) -> list[str]:
        return self.files.subfolder(parent).list_top()[0]

    def _earlier_layout(self, keys: list[str]) -> SplitLayout | None:
        folders = {key.partition("/")[0] for key in keys if "/" in key}
        if not folders or not folders <= SPLIT_OF_WORD.keys() or not all("/" in key for key in keys):
            return None
        return SplitLayout(0, 1, dict.fromkeys(folders))

    def _labels(self, keys: list[str], depth: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return class numbers and names. depth: position in a key's path of the folder that names its class."""
        parts = [key.split("/", depth + 1) for key in keys]
        loose = next((key for key, part in zip(keys, parts, strict=True) if len(part) < depth + 2), None)
        if loose is None:
            folders = pa.chunked_array([pa.array([part[depth] for part in parts])])
            return number_labels(
                folders, self.config.class_names, f"folders of {self.files.root}", self.config.class_order
            )
        if any(len(part) >= depth + 2 for part in parts):
            raise InvalidInput(
                f"images.path: found class folders and loose images such as {loose} in {self.files.root}",
                "one or the other",
                "move the loose images into the folder of their class",
            )
        return np.zeros(len(keys), np.int32), ()

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        return map(try_decode, self.files.read_each(keys), keys)
