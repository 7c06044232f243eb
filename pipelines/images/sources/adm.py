"""ADM's sample and reference files: .npz with images in arr_0 and optional labels in arr_1."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from evaluation.npz import check_npz
from pipelines.images.claimed_sizes import check_rows
from pipelines.images.labels import MAX_CLASSES, number_labels
from pipelines.images.listing import Listing, Locations, make_stamp, shorten_list
from pipelines.images.source_files import Files, ImagesPath
from pipelines.images.splits import refuse_absent_split
from raydit.errors import InvalidInput, RayditError
from raydit.lfs import refuse_lfs_pointer

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
"""Members of the archive."""
BROKEN = (ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What zipfile, zlib and NumPy raise for a broken archive."""
MAX_DEFLATION = 1100
"""Most bytes that zlib can make of one; it reaches 1,032."""
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
        where = self.files.path(self.name)
        refuse_absent_split(self.config, where, self.name)
        labels, class_names = self._number_labels(where) if self.config.reading is None else self._earlier_labels(where)
        keys, stamps = [f"{index:07d}" for index in range(len(labels))], np.full(len(labels), self._stamp, np.int64)
        return Listing(keys, labels, stamps, class_names, root=where)

    def _number_labels(self, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return class numbers and names. Raises InvalidInput unless there is one integer for each image, or none."""
        count, labels = self.shape[0], self._labels
        if labels is None and not self.config.class_names:
            return np.zeros(count, np.int32), ()
        if labels is None:
            raise InvalidInput(
                f"images.class_names: found {shorten_list(self.config.class_names)} for images without labels in "
                f"{where}",
                "a label for each image in arr_1",
                "remove images.class_names, or add the labels",
            )
        if labels.size != count or labels.dtype.kind not in "iufb":
            raise _wrong_labels(where, labels, f"{count:,} integers, one for each image")
        if labels.dtype.kind in "fb":  # also without fractions, and in types of which Arrow knows little
            labels = labels.astype(np.float64)
        column = pa.chunked_array([pa.array(labels.ravel().astype(labels.dtype.newbyteorder("=")))])
        return number_labels(column, self.config.class_names, f"{where}, arr_1")

    def _earlier_labels(self, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return class numbers and names as releases did that left out labels of another number than the images."""
        count, labels = self.shape[0], self._labels
        if labels is None or labels.size != count:
            return np.zeros(count, np.int32), self.config.class_names
        if labels.dtype.kind not in "iufb" or not _in_range(labels):
            raise _wrong_labels(where, labels, f"integers from 0 to {MAX_CLASSES - 1:,}")
        numbers = labels.ravel().astype(np.int32)
        return numbers, self.config.class_names or tuple(str(label) for label in range(int(numbers.max()) + 1))

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
        with self._open_archive() as archive:
            return self._read_array(archive, IMAGES)

    @cached_property
    def _stored(self) -> StoredArray:
        where = self.files.path(self.name)
        with self.files.open(self.name) as file, self._explain():
            refuse_lfs_pointer(file.read_at(min(file.size(), 100), 0), f"images.path: {where}", "the .npz file")
            arrays = check_npz(file, f"images.path: {where}", MAX_DEFLATION)
            if IMAGES.removesuffix(".npy") not in arrays:
                raise InvalidInput(
                    f"images.path: found {', '.join(f'{name}.npy' for name in arrays)} in {where}",
                    "images in arr_0, as in ADM's files",
                    "set images.path to another file",
                )
            shape, fortran, dtype, header = arrays[IMAGES.removesuffix(".npy")]
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or min(shape[1:]) < 1:
                raise InvalidInput(
                    f"images.path: found arr_0 of {dtype} {shape} in {where}",
                    "uint8 (N, H, W, 3)",
                    "convert the images and write the file again",
                )
            check_rows(shape[0], file.size(), where)
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo(IMAGES)
            if info.compress_type != zipfile.ZIP_STORED:
                return StoredArray(shape, None)
            file.seek(info.header_offset + _LOCAL_HEADER - 4)
            name_and_extra = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        return StoredArray(shape, info.header_offset + _LOCAL_HEADER + name_and_extra + header)

    @cached_property
    def _labels(self) -> np.ndarray | None:
        with self._open_archive() as archive:
            return self._read_array(archive, LABELS) if LABELS in archive.namelist() else None

    @cached_property
    def _stamp(self) -> int:
        """The same for all images: made of the checksum of the array, which the archive records."""
        with self._open_archive() as archive:
            return make_stamp(archive.getinfo(IMAGES).CRC.to_bytes(4, "little"))

    @contextmanager
    def _open_archive(self) -> Iterator[zipfile.ZipFile]:
        with self.files.open(self.name) as file, self._explain(), zipfile.ZipFile(file) as archive:
            yield archive

    @contextmanager
    def _explain(self) -> Iterator[None]:
        """Replace what zipfile, zlib and NumPy raise for a broken archive with InvalidInput."""
        try:
            yield
        except RayditError:
            raise
        except BROKEN as error:
            raise InvalidInput(
                f"images.path: {self.files.path(self.name)}: found no readable .npz file ({error})",
                "a complete archive that NumPy wrote",
                "copy it again",
            ) from error

    def _read_array(self, archive: zipfile.ZipFile, name: str) -> np.ndarray:
        """Read an array, of which `check_npz` has compared what its header claims with the file."""
        assert self._stored, "checks the file"
        with archive.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _in_range(labels: np.ndarray) -> bool:
    return not labels.size or bool(labels.min() >= 0 and labels.max() < MAX_CLASSES)  # False for NaN


def _wrong_labels(where: str, labels: np.ndarray, expected: str) -> InvalidInput:
    return InvalidInput(
        f"images.path: {where}: found labels of {labels.dtype} {labels.shape} in arr_1",
        expected,
        "correct the labels, or leave them out",
    )
