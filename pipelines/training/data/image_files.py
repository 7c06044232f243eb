"""The images that an autoencoder trains on: decoded and cropped once, in files that workers read single images from.

A file holds some of the images, in the order of the listing, as uint8 rows of (size, size, 3) without a header. Workers
read with pread, so that neither their memory nor Ray's object store grows with the number of images: what is read often
stays in the page cache, which the kernel gives up when memory is short. The files lie beside the checkpoints that
training resumes from, are found again by a run that resumes, and are removed with those at the end. From an object
store, each machine fetches them once.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import storage
from pipelines.config.recipe import ImagesConfig
from pipelines.images.listing import Listing
from pipelines.images.open import with_absolute_paths
from pipelines.images.preprocess import read_cropped
from pipelines.latents.quarantine import most_unusable
from raydit.errors import InvalidInput, StorageFailed

FILE_IMAGES, FILE_BYTES = 2048, 64 * 2**20
"""Most images of one file, and about its most bytes: what the task that writes it holds in memory."""
MAX_OPEN_FILES = 256
"""Files that a worker keeps open, below the usual limit of 1,024 for a process."""


@dataclass(frozen=True)
class ImageFile:
    """A finished file of images."""

    uri: str
    """Path or URI."""
    rows: int
    """Number of images in the file, without those that cannot be used."""
    unusable: int = 0
    """Number of images that belong in the file but cannot be used."""
    errors: tuple[tuple[str, str], ...] = ()
    """Keys of images that cannot be used now, and why."""


def write_image_files(images: ImagesConfig, listing: Listing, folder: str, *, begun: bool = False) -> list[Any]:
    """Start Ray tasks that write the images of a listing into files in a folder, except for files that are there.

    Files appear completely or not at all, with names that a run that resumes gives them again. One that lacks images is
    written again unless training has begun with it. Returns references to ImageFile, in order.
    """
    import ray

    images = with_absolute_paths(images)
    folder = storage.join(storage.absolute(folder), listing.digest[:12])
    write, shared = ray.remote(num_cpus=1)(write_image_file), storage.mark_folder(folder)
    step = max(1, min(FILE_IMAGES, FILE_BYTES // (images.size**2 * 3)))
    files = []
    for start in range(0, len(listing), step):
        stop = min(start + step, len(listing))
        locations = None if listing.locations is None else listing.locations[start:stop]
        uri = storage.join(folder, f"{start:010d}-{stop:010d}.u8")
        files.append(write.remote(images, uri, listing.keys[start:stop], locations, begun, shared))
    return files


def write_image_file(
    images: ImagesConfig,
    uri: str,
    keys: Sequence[str],
    locations: np.ndarray | None,
    begun: bool,
    shared: storage.SharedFolder | None = None,
) -> ImageFile:
    """Write the images of some keys into a file, unless it is there; see `write_image_files`.

    shared: the file's folder, which must be the same one on all machines.
    """
    if shared is not None:
        shared.require()
    rows = storage.file_size(uri) // (images.size**2 * 3) if storage.exists(uri) else None
    if rows == len(keys):
        return ImageFile(uri, rows)
    read = read_cropped(images, keys, locations)
    if rows is None or not begun:
        storage.write_atomically(uri, read.images.tobytes())
        rows = len(read.images)
    return ImageFile(uri, rows, len(keys) - rows, tuple(read.errors.items()))


def describe_unusable(files: Sequence[ImageFile], kind: str, share: float, folder: str, least: int = 1) -> str:
    """Return a line about the images that are left out of some files; empty if there are none.

    kind: of the images, "training" or "held-out". share: encode.max_quarantined. folder: that of the training. least:
    images that are needed. Raises InvalidInput if more images are unusable than allowed, or not as many as when the
    training began.
    """
    count, errors = sum(file.unusable for file in files), [error for file in files for error in file.errors]
    if not count:
        return ""
    total = sum(file.rows for file in files) + count
    if len(errors) != count:
        raise InvalidInput(
            f"images: {len(errors):,} of {total:,} {kind} images cannot be used, and {count:,} when training began",
            "the images that it began with",
            f"remove {folder} and run the command again, which then trains from the start",
        )
    key, reason = errors[0]
    allowed = min(most_unusable(share, total), total - least)
    if count > allowed:
        raise InvalidInput(
            f"images: {count:,} of {total:,} {kind} images cannot be used, such as {key} ({reason})",
            f"at most {allowed:,} (encode.max_quarantined = {share:g}, and {least} usable)",
            "repair or remove them" + (", or raise encode.max_quarantined" if share < 1 else ""),
        )
    return f"{count:,} of {total:,} {kind} images cannot be used and are left out, such as {key} ({reason})"


def wait_for_running(files: Sequence[Any]) -> None:
    """Wait until so few of the files are unfinished that the tasks of all of them run.

    Training workers may take all CPUs that are free when they start, and wait for the files: a task that has not begun
    by then might never begin. Raises the error of a task that has failed.
    """
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    if len(files) > cpus:
        ready, _ = ray.wait(list(files), num_returns=len(files) - cpus)
        ray.get(ready)


class ImageRows:
    """All images of some files by their row, from 0 on."""

    def __init__(self, files: Sequence[ImageFile], size: int):
        """Fetch files that are in an object store. size: side of the images in pixels."""
        self.size = size
        self._paths = [storage.fetch_file(file.uri) for file in files]
        self._copies = [path for path, file in zip(self._paths, files, strict=True) if not storage.is_local(file.uri)]
        self._starts = np.cumsum([0, *(file.rows for file in files)])
        # Of this object, so that its files are closed with it.
        self._open = functools.lru_cache(maxsize=MAX_OPEN_FILES)(_OpenFile)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images at some rows, uint8 (n, size, size, 3)."""
        images = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for image, row, number in zip(images, rows, numbers, strict=True):
            self._open(self._paths[number]).read_into(image, int(row - self._starts[number]) * image.nbytes)
        return images

    def remove_copies(self) -> None:
        """Remove this machine's copies of files in an object store, which no worker of it may read from any more."""
        for path in self._copies:
            storage.remove_folder(os.path.dirname(path))  # the cache has a folder for each file


class _OpenFile:
    """A file that is open for reading until the object is dropped."""

    def __init__(self, path: str):
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill a contiguous array with the bytes from an offset on."""
        if os.preadv(self._descriptor, [array.data], offset) != array.nbytes:
            raise StorageFailed(
                f"{self._path} ends before the image at byte {offset:,}", "", "remove it and train again"
            )

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
