"""Image files in folders: a folder for each class, or one folder of images without classes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.images.decoding import SUFFIXES, is_image, try_decode
from pipelines.images.files import Files, ImagesPath
from pipelines.images.labels import number_labels
from pipelines.images.listing import Listing, Locations
from pipelines.images.splits import SPLIT_OF_WORD, pick_split
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

    Keys are file names relative to the root. If all folders are splits of a data set (train, val, test), the wanted
    one holds the class folders.
    """

    def __init__(self, files: Files, config: "ImagesConfig"):
        self.files, self.config = files, config

    def listing(self) -> Listing:
        names, sizes = self.files.list_all()
        shown = np.flatnonzero([is_image(name) for name in names])
        keys = [names[index] for index in shown]
        if not keys:
            raise NotFound(
                f"images.path: found no images in {self.files.root}",
                f"files ending in {', '.join(sorted(SUFFIXES))}, in a folder for each class or all in one",
                "correct images.path, or set images.format",
            )
        folders, depth = {key.partition("/")[0] for key in keys if "/" in key}, 0
        if folders and folders <= SPLIT_OF_WORD.keys() and all("/" in key for key in keys):
            wanted = pick_split(sorted(folders), self.config.split, self.files.root)
            inside = [index for index, key in enumerate(keys) if key.partition("/")[0] in wanted]
            keys, shown, depth = [keys[index] for index in inside], shown[inside], 1
        labels, class_names = self._labels(keys, depth)
        notes = self._note_empty_folders(keys, depth) if class_names else ()
        return Listing(keys, labels, sizes[shown], class_names, notes=notes)

    def _note_empty_folders(self, keys: list[str], depth: int) -> tuple[str, ...]:
        """Say which folders beside those of the classes hold no images: classes are numbered without them."""
        parents = sorted({key.partition("/")[0] for key in keys}) if depth else [""]
        used = {tuple(key.split("/")[: depth + 1]) for key in keys}
        prefixes = {"/".join(path) for path in used}
        beside = [f"{parent}/{name}".lstrip("/") for parent in parents for name in self._folders_in(parent)]
        empty = [folder for folder in beside if folder not in prefixes]
        if not empty or self.config.class_names:
            return ()
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        return (f"{len(empty)} folders without images are no classes ({shown}): classes are numbered without them",)

    def _folders_in(self, parent: str) -> list[str]:
        return self.files.subfolder(parent).list_top()[0]

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
        return map(try_decode, self.files.read_each(keys))
