"""Image files in folders: a folder for each class, or one folder of images without classes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.images.decoding import SUFFIXES, decode, is_image
from pipelines.images.files import Files
from pipelines.images.labels import number_labels
from pipelines.images.listing import Listing
from pipelines.images.splits import WORDS, pick_split

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig


class ImageFiles:
    """Images that are files; keys are their names below the root."""

    def __init__(self, files: Files, config: "ImagesConfig"):
        self.files, self.config = files, config

    def read(
        self, keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
    ) -> Iterator["Image.Image | Exception"]:
        for data in self.files.read_each(keys):
            try:
                if isinstance(data, Exception):
                    raise data
                yield decode(data)
            except Exception as error:
                yield error


class FolderSource(ImageFiles):
    """A folder for each class (sorted names are the classes), or one folder of images without classes.

    Where all folders are parts of a data set (train, val, test), the wanted one holds the classes.
    """

    def listing(self) -> Listing:
        names, sizes = self.files.listing()
        shown = np.flatnonzero([is_image(name) for name in names])
        keys = [names[place] for place in shown]
        if not keys:
            raise FileNotFoundError(
                f"images.path: no images in {self.files.root}; expected files ending in {', '.join(sorted(SUFFIXES))}, "
                "in a folder for each class or all in one"
            )
        folders, start = {key.partition("/")[0] for key in keys if "/" in key}, 0
        if folders and folders <= WORDS.keys() and all("/" in key for key in keys):
            wanted = pick_split(sorted(folders), self.config.split, self.files.root)
            inside = [place for place, key in enumerate(keys) if key.partition("/")[0] in wanted]
            keys, shown, start = [keys[place] for place in inside], shown[inside], 1
        labels, class_names = self._labels(keys, start)
        return Listing(keys, labels, sizes[shown], class_names)

    def _labels(self, keys: list[str], start: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """From the part of each key that names its class, if it has one."""
        parts = [key.split("/", start + 1) for key in keys]
        loose = next((key for key, part in zip(keys, parts, strict=True) if len(part) < start + 2), None)
        if loose is None:
            folders = pa.chunked_array([pa.array([part[start] for part in parts])])
            return number_labels(folders, self.config.class_names, f"folders of {self.files.root}")
        if any(len(part) >= start + 2 for part in parts):
            raise ValueError(
                f"images.path: {self.files.root} holds class folders and loose images such as {loose}; expected one or "
                "the other. Move the loose images into a folder of their class"
            )
        return np.zeros(len(keys), np.int32), ()
