"""Where training batches read latents from: a worker's memory, a file that a node's workers share, or the shards.

Memory and the shared file allow any order of images. Shards are for a data set that fits neither into memory nor on the
node's disk: they are read one after another, and images are shuffled among a few of them (see WindowOrder).
"""

import errno
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from cluster import storage
from pipelines.config.training import LoadingBackend as Backend
from pipelines.latents.dataset import LatentArrays, LatentDataset, fingerprint_of
from pipelines.latents.verify import read_verified_shard
from pipelines.training.data.order import EpochOrder, WindowOrder

MEMORY_BYTES = 256 * 2**20
"""Size up to which every worker copies the data set into its memory."""


class LatentSource(Protocol):
    """Reads rows of a latent data set, in the order in which training visits them."""

    latent_shape: tuple[int, int, int]
    """(C, H, W)"""
    moments_shape: tuple[int, int, int]
    """(2C, H, W), or that of the latents where they are deterministic."""

    @property
    def order(self) -> EpochOrder: ...

    def read(self, rows: np.ndarray, flip: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """Copy the moments of rows (n,) into `moments`, float16 (n, *moments_shape), and return the labels, int64 (n,).

        flip: bool (n,), whether to take the moments of the horizontally flipped image, where these were encoded.
        """
        ...

    def prefetch(self, position: int) -> None:
        """Start to load what is read next, from a position in the order on."""
        ...


def choose_backend(dataset: LatentDataset) -> Backend:
    """Choose where to read a data set from on this node, by its size."""
    if dataset.array_bytes <= MEMORY_BYTES:
        return "memory"
    return "memmap" if _fits_on_disk(dataset, Path(storage.cache_folder("latents"))) else "stream"


def _fits_on_disk(dataset: LatentDataset, cache: Path) -> bool:
    """Return whether the folder `cache` has a copy of the data set, or its disk has room for one.

    Waits for another process that is copying the data set, if that is what takes the room.
    """
    folder, lock = _paths_of_copy(dataset, cache)

    def has_room() -> bool:
        # As much again must stay free, for others who use the disk.
        return 2 * dataset.array_bytes <= shutil.disk_usage(storage.nearest_folder(str(cache))).free

    if folder.is_dir() or has_room():
        return True
    if not lock.is_file():
        return False
    with storage.lock(str(lock)):
        storage.remove_stale_temporaries(str(cache))  # of a process that was killed while it copied
        return folder.is_dir() or has_room()


def explain_stream(dataset: LatentDataset, shuffle_rows: int) -> str:
    """Return in words why a data set is read shard by shard if train.loading is "auto"."""
    return (
        f"train.loading = 'auto': latents of {dataset.array_bytes / 2**30:,.1f} GiB are read shard by shard and "
        f"shuffled among {shuffle_rows:,} images at a time (train.shuffle_rows), because a copy of them in "
        f"{storage.cache_folder('latents')} would fill more than half of a node's free disk"
    )


def open_latent_source(dataset: LatentDataset, backend: Backend, *, seed: int, shuffle_rows: int) -> LatentSource:
    """Open a data set for training. shuffle_rows: images that a stream shuffles together."""
    if backend == "stream":
        shard_rows = [shard.rows for shard in dataset.shards]
        return StreamedLatents(dataset, WindowOrder(shard_rows, shuffle_rows, seed))
    arrays = open_arrays(dataset, in_memory=backend == "memory")
    return ArrayLatents(arrays, EpochOrder(len(arrays.labels), seed), deterministic=dataset.is_deterministic)


def open_arrays(dataset: LatentDataset, *, in_memory: bool | None = None) -> LatentArrays:
    """Open a data set as arrays in this worker's memory, or mapped from one file for all workers of a node.

    in_memory: None chooses by size.
    """
    if dataset.array_bytes <= MEMORY_BYTES if in_memory is None else in_memory:
        return dataset.arrays
    return memory_mapped_arrays(dataset, Path(storage.cache_folder("latents")))


class ArrayLatents:
    """A LatentSource of arrays, in memory or memory-mapped."""

    def __init__(self, arrays: LatentArrays, order: EpochOrder, *, deterministic: bool = False):
        """deterministic: whether the moments are latents, without a log variance."""
        self.arrays, self.order, self.moments_shape = arrays, order, arrays.moments.shape[1:]
        channels, height, width = self.moments_shape
        self.latent_shape = (channels if deterministic else channels // 2, height, width)

    def read(self, rows: np.ndarray, flip: np.ndarray, moments: np.ndarray) -> np.ndarray:
        self.arrays.copy_moments(rows, flip, moments)
        return self.arrays.labels[rows]

    def prefetch(self, position: int) -> None:
        pass


class StreamedLatents:
    """A LatentSource of shards, which holds those of the current and the next window in memory."""

    def __init__(self, dataset: LatentDataset, order: WindowOrder):
        self.dataset, self.order = dataset, order
        self.latent_shape, self.moments_shape = dataset.latent_shape, dataset.moments_shape
        self._held: dict[int, Future[LatentArrays]] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="latents")

    def read(self, rows: np.ndarray, flip: np.ndarray, moments: np.ndarray) -> np.ndarray:
        shards = self.order.shards_of(rows)
        labels = np.empty(len(rows), np.int64)
        for shard in np.unique(shards).tolist():
            of_shard = np.flatnonzero(shards == shard)
            rows_in_shard = rows[of_shard] - self.order.starts[shard]
            arrays = self._load(shard).result()
            labels[of_shard] = arrays.labels[rows_in_shard]
            of_shard_moments = np.empty((len(of_shard), *moments.shape[1:]), moments.dtype)
            arrays.copy_moments(rows_in_shard, flip[of_shard], of_shard_moments)
            moments[of_shard] = of_shard_moments
        return labels

    def prefetch(self, position: int) -> None:
        needed = {shard for window in self.order.current_and_next_window(position) for shard in window}
        self._held = {shard: held for shard, held in self._held.items() if shard in needed}
        for shard in needed:
            self._load(shard)

    def _load(self, shard: int) -> Future[LatentArrays]:
        if shard not in self._held:
            self._held[shard] = self._pool.submit(self.dataset.shard_arrays, shard)
        return self._held[shard]


def memory_mapped_arrays(dataset: LatentDataset, cache: Path) -> LatentArrays:
    """Map the data set from files in the folder `cache`, which the first worker of a node writes for all of them.

    Raises InvalidInput, and keeps no files, if a shard has another digest than the manifest lists.
    """
    folder, lock = _paths_of_copy(dataset, cache)
    cache.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with storage.lock(str(lock)):
        if not folder.is_dir():
            storage.remove_stale_temporaries(str(cache))
            with storage.temporary_path(str(cache), dataset.array_bytes) as temporary:
                _write_arrays(dataset, Path(temporary))
                try:
                    os.rename(temporary, folder)
                except OSError:
                    # On a file system without locks, which nodes may share, another worker was faster: equal content.
                    if not folder.is_dir():
                        raise
    flip = folder / "moments_flip.npy"
    return LatentArrays(
        labels=np.load(folder / "labels.npy"),
        moments=np.load(folder / "moments.npy", mmap_mode="r"),
        moments_flip=np.load(flip, mmap_mode="r") if flip.is_file() else None,
    )


def _paths_of_copy(dataset: LatentDataset, cache: Path) -> tuple[Path, Path]:
    """Return the folder with the copy of a data set, and the file that is locked while it is made."""
    # Computed, because a manifest may claim the fingerprint of another data set.
    name = fingerprint_of(dataset.description, dataset.shards)
    return cache / name, cache / f"{name}.lock"


def _write_arrays(dataset: LatentDataset, folder: Path) -> None:
    folder.mkdir()
    shape = (len(dataset), *dataset.moments_shape)
    names = ["moments", "moments_flip"] if dataset.has_flip else ["moments"]
    files = {name: _create_array(folder / f"{name}.npy", np.float16, shape) for name in names}
    files["labels"], start = _create_array(folder / "labels.npy", np.int64, shape[:1]), 0
    for shard in dataset.shards:
        # Later trainings, of which none reads the shards again, use these files too.
        arrays = LatentArrays.from_tables([read_verified_shard(dataset, shard)], dataset.moments_shape)
        stop = start + len(arrays.labels)
        for name, file in files.items():
            file[start:stop] = getattr(arrays, name)
        start = stop
    for file in files.values():
        file.flush()


def _create_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    """Create an .npy file to write to through memory, with space on the disk for all of it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # Else the file is sparse, and writing to a full disk through memory kills the process by SIGBUS.
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot do it
                    raise
    return array
