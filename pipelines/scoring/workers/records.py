"""Records of shards: the .npz files that actors write, and that scores are computed from."""

import io
import os
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import BinaryIO, Self

import numpy as np

from cluster import storage
from evaluation.extractors import Features
from pipelines.console import counted
from pipelines.scoring.workers.shards import ScoringShard
from raydit.errors import InvalidInput

MAX_PREVIEW_IMAGES = 1000
"""Samples whose images are kept in the records of scored shards, for pictures; 50,000 of 256 px would take 10 GB."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What an actor computed for one shard. Field names are the keys of the file; None is left out of it.

    Arrays are in the order of the shard's images; those of real images leave out the unreadable ones.
    """

    indices: np.ndarray | None = None
    """(N,) int64, of samples."""
    labels: np.ndarray | None = None
    """(N,) int64, of samples."""
    images: np.ndarray | None = None
    """(N, H, W, 3) uint8, of samples."""
    features: np.ndarray | None = None
    """(N, D) float32."""
    logits: np.ndarray | None = None
    """(N, K) float32, from extractors that have logits."""
    spatial: np.ndarray | None = None
    """(N, 2023) float32, from extractors that have spatial features."""
    unreadable: np.ndarray | None = None
    """Keys of the real images that could not be read, sorted."""
    num_constant: np.ndarray | None = None
    """() int64: how many samples are of a single colour; absent in records of earlier versions."""
    sampling_seconds: np.ndarray | None = None
    """() float64: duration of sampling."""
    extraction_seconds: np.ndarray | None = None
    """() float64: duration of feature extraction."""

    def write(self, file: str) -> None:
        """Write the record to a path or URI, atomically."""
        buffer = io.BytesIO()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(buffer, **{name: value for name, value in values.items() if value is not None})
        storage.write_atomically(file, buffer.getvalue())

    @classmethod
    def read(cls, file: BinaryIO, without: Collection[str] = ()) -> Self:
        """Read a record, except for the fields in `without`."""
        return cls(**read_arrays(file, without))

    @property
    def num_images(self) -> int:
        """Number of images that the record covers, whether they could be read or not."""
        computed = self.images if self.features is None else self.features
        return sum(len(array) for array in (computed, self.unreadable) if array is not None)


@dataclass(frozen=True, kw_only=True)
class LoadedFeatures:
    """Features of all images of some shards, in order."""

    features: Features
    labels: np.ndarray | None
    """(N,) int64, of samples."""
    num_constant: int
    """How many samples are of a single colour, as far as that was recorded."""
    timings: dict[str, float]
    """Seconds that the workers spent, summed over all of them, by the name under which reports have them."""


def read_results(shards: Sequence[ScoringShard], without: Collection[str] = ()) -> Iterator[ShardResult]:
    """Yield the records of finished shards in order, except for the fields in `without`.

    Raises InvalidInput for a record that does not cover its shard's images.
    """
    files = storage.open_in_order([shard.file for shard in shards])
    for shard, file in zip(shards, files, strict=True):
        with file:
            record = ShardResult.read(file, without)
        if record.num_images != len(shard.images):
            raise _wrong_record(shard, f"{record.num_images} images", str(len(shard.images)))
        yield record


def load_features(shards: Sequence[ScoringShard]) -> LoadedFeatures:
    """Load features, logits and labels of all images of finished shards; images stay on storage.

    Raises InvalidInput if a record holds other samples than its shard, or if an image could not be read: a score is
    of a known number of images. The records of all shards with such images are removed then.
    """
    total, start, constant = sum(len(shard.images) for shard in shards), 0, 0
    arrays: dict[str, np.ndarray] = {}
    timings: dict[str, float] = {}
    for shard, record in zip(shards, read_results(shards, without=("images",)), strict=True):
        for name in ("sampling_seconds", "extraction_seconds"):
            if (seconds := getattr(record, name)) is not None:
                timings[name] = timings.get(name, 0.0) + float(seconds)
        _check_record(shard, record)
        if record.unreadable is not None and len(record.unreadable):
            raise _unreadable(remove_unreadable(shards))
        constant += 0 if record.num_constant is None else int(record.num_constant)
        count = len(shard.images)
        for name in ("labels", "features", "logits", "spatial"):
            if (part := getattr(record, name)) is not None:
                # Filled in place: parts joined at the end would be in memory twice.
                array = arrays.setdefault(name, np.empty((total, *part.shape[1:]), part.dtype))
                array[start : start + count] = part
        start += count
    return LoadedFeatures(
        features=Features(arrays["features"], arrays.get("logits"), arrays.get("spatial")),
        labels=arrays.get("labels"),
        num_constant=constant,
        timings={f"workers_{name}": round(seconds, 3) for name, seconds in timings.items()},
    )


def _check_record(shard: ScoringShard, record: ShardResult) -> None:
    if isinstance(shard.images, range):
        assert record.indices is not None, "samples have indices"
        if not np.array_equal(record.indices, shard.images):
            raise _wrong_record(shard, f"samples {_ends(record.indices)}", _ends(shard.images))


def remove_unreadable(shards: Sequence[ScoringShard]) -> list[str]:
    """Remove the records of the shards with images that could not be read, and return the keys of these images.

    The same command then reads them again: they may have been repaired since, which their lengths need not show.
    """
    keys: list[str] = []
    files = storage.open_in_order([shard.file for shard in shards])
    for shard, file in zip(shards, files, strict=True):
        with file:
            unreadable = ShardResult.read(file, without=(*Features._fields, "images")).unreadable
        if unreadable is not None and len(unreadable):
            keys += unreadable.tolist()
            storage.remove_file(shard.file)
    return keys


def _unreadable(keys: Sequence[str]) -> InvalidInput:
    return InvalidInput(
        f"{counted(len(keys), 'image')} cannot be read, such as {keys[0]}",
        "every image to be scored",
        "Repair, replace or remove them, and run the command again",
    )


def _wrong_record(shard: ScoringShard, found: str, expected: str) -> InvalidInput:
    return InvalidInput(f"{shard.file}: found {found}", expected, "Delete it and run again")


def _ends(indices: Sequence[int] | np.ndarray) -> str:
    return f"{indices[0]} to {indices[-1]}"


def load_preview_images(shards: Sequence[ScoringShard]) -> np.ndarray:
    """Load the images of the samples of `preview_shards`, uint8 (N, H, W, 3)."""
    first = preview_shards(shards)
    return np.concatenate([record.images for record in read_results(first) if record.images is not None])


def preview_shards(shards: Sequence[ScoringShard]) -> list[ScoringShard]:
    """Return the shards whose images are kept: those of the first MAX_PREVIEW_IMAGES samples or so."""
    return [shard for shard in shards if isinstance(shard.images, range) and shard.images.start < MAX_PREVIEW_IMAGES]


_MAGIC_BYTES, _LENGTH_BYTES = 8, 2
"""Start of an array in format 1.0: magic string and version, then the length of the header (dtype, order, shape)."""


def read_arrays(file: BinaryIO, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Read the arrays of a file that np.savez wrote, by name, except for those in `without`.

    Faster than np.load for many small files, which spends half the time on parsing headers that are all equal.
    Raises zipfile.BadZipFile for a truncated file, ValueError for an array of objects: nothing is unpickled.
    """
    with zipfile.ZipFile(file) as members:
        if sum(info.file_size for info in members.infolist()) > file.seek(0, os.SEEK_END):
            raise ValueError("found arrays larger than their file, expected no compression, as np.savez writes them")
        names = {member: member.removesuffix(".npy") for member in members.namelist()}
        return {name: _array(members.read(member)) for member, name in names.items() if name not in without}


def _array(data: bytes) -> np.ndarray:
    begin = _MAGIC_BYTES + _LENGTH_BYTES
    end = begin + int.from_bytes(data[_MAGIC_BYTES:begin], "little")
    shape, fortran_order, dtype = _parse_header(data[:end])
    if dtype.hasobject:
        raise ValueError("found an array of objects, expected numbers or text: it is not one of raydit's records")
    # A copy, which can be written to.
    return np.ndarray(shape, dtype, data, offset=end, order="F" if fortran_order else "C").copy(order="K")


@lru_cache
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(header)
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"found an array in format {version}, expected (1, 0), as np.savez writes those of raydit")
    return np.lib.format.read_array_header_1_0(file)
