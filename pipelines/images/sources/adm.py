"""ADM's sample and reference files: .npz with images in arr_0 and optional labels in arr_1."""

import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation.npz import check_npz
from pipelines.images.files import Files, ImagesPath
from pipelines.images.listing import Listing, Locations, make_stamp
from raydit.errors import InvalidInput
from raydit.lfs import refuse_lfs_pointer

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
"""Members of the archive."""
_LOCAL_HEADER = 30
"""Length in bytes of a ZIP member's own header, up to its name."""


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is an .npz file."""
    return path.name is not None and path.name.endswith(".npz")


def open_npz(path: ImagesPath, config: "ImagesConfig") -> "AdmSource":
    """Open an .npz file."""
    assert path.name is not None, "only files are recognised"
    return AdmSource(path.files, path.name, config)


class StoredArray(NamedTuple):
    """The array of images in the archive."""

    shape: tuple[int, ...]
    """(N, H, W, 3)"""
    offset: int | None
    """Offset in the file of the first pixel; images follow each other in C order. None if they are compressed."""


class AdmSource:
    """Images uint8 (N, H, W, 3) in arr_0; keys are their positions. Each is read by a seek if arr_0 is not compressed.

    A compressed array is held in memory.
    """

    def __init__(self, files: Files, name: str, config: "ImagesConfig"):
        self.files, self.name, self.config = files, name, config

    def listing(self) -> Listing:
        count, labels = self.shape[0], self._labels
        known = labels is not None and len(labels) == count
        numbers = np.asarray(labels if known else np.zeros(count), np.int32)
        names = tuple(str(label) for label in range(int(numbers.max()) + 1)) if known else ()
        stamps = np.full(count, self._stamp, np.int64)
        return Listing([f"{index:07d}" for index in range(count)], numbers, stamps, self.config.class_names or names)

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        from PIL import Image

        _, *shape = self.shape
        num_bytes, offset = int(np.prod(shape)), self._stored.offset
        if offset is None:
            yield from (Image.fromarray(self._decompressed[int(key)]) for key in keys)
            return
        with self.files.open(self.name) as file:
            for key in keys:
                data = file.read_at(num_bytes, offset + int(key) * num_bytes)
                yield Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array of images: (N, H, W, 3)."""
        return self._stored.shape

    @cached_property
    def _decompressed(self) -> np.ndarray:
        with self.files.open(self.name) as file, zipfile.ZipFile(file) as archive, archive.open(IMAGES) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    @cached_property
    def _stored(self) -> StoredArray:
        where = self.files.path(self.name)
        with self.files.open(self.name) as file:
            refuse_lfs_pointer(file.read_at(min(file.size(), 100), 0), f"images.path: {where}", "the .npz file")
            arrays = check_npz(file, f"images.path: {where}")
            if "arr_0" not in arrays:
                raise InvalidInput(
                    f"images.path: found {', '.join(f'{name}.npy' for name in arrays)} in {where}",
                    "images in arr_0, as in ADM's files",
                    "set images.path to another file",
                )
            (shape, fortran, dtype, header) = arrays["arr_0"]
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or min(shape[1:]) == 0:
                raise InvalidInput(
                    f"images.path: found arr_0 of {dtype} {shape} in {where}",
                    "uint8 (N, H, W, 3)",
                    "convert the images and write the file again",
                )
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo(IMAGES)
            if info.compress_type != zipfile.ZIP_STORED:
                return StoredArray(shape, None)
            file.seek(info.header_offset + _LOCAL_HEADER - 4)
            name_and_extra = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        return StoredArray(shape, info.header_offset + _LOCAL_HEADER + name_and_extra + header)

    @cached_property
    def _labels(self) -> np.ndarray | None:
        with self.files.open(self.name) as file, zipfile.ZipFile(file) as archive:
            if LABELS not in archive.namelist():
                return None
            with archive.open(LABELS) as member:
                return np.lib.format.read_array(member, allow_pickle=False).ravel()

    @cached_property
    def _stamp(self) -> int:
        """The same for all images: made of the checksum of the array, which the archive records."""
        with self.files.open(self.name) as file, zipfile.ZipFile(file) as archive:
            return make_stamp(archive.getinfo(IMAGES).CRC.to_bytes(4, "little"))
