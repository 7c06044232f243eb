"""Where training batches take latents from: this process's memory, a file that a node's workers share, or shards.

The first two allow any order. Shards are read one after another, a few at a time, where neither memory nor the
node's disk holds the data set; images are then shuffled among those few (`pipelines.training.order.WindowOrder`).
"""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from cluster import storage
from pipelines.latents.dataset import LatentArrays, LatentDataset
from pipelines.training.order import EpochOrder, WindowOrder

Backend = Literal["memory", "memmap", "stream"]
MEMORY_BYTES = 256 * 2**20
"""A data set of so many bytes is copied by every worker without a second thought."""


class Latents(Protocol):
    """Rows of a latent data set, and the order in which training goes through them."""

    latent_shape: tuple[int, int, int]
    """(C, H, W)"""

    @property
    def order(self) -> EpochOrder: ...

    def read(self, rows: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels int64 (n,) and moments float16 (n, 2C, H, W) of rows; of the mirrored ones those of the mirror."""
        ...

    def ahead(self, place: int) -> None:
        """Be told of the place in the order that is read next."""
        ...


def choose_backend(dataset: LatentDataset) -> Backend:
    """Where a data set is best read from on this node, by its size."""
    if dataset.array_bytes <= MEMORY_BYTES:
        return "memory"
    folder = storage.nearest_folder(storage.cache_folder("latents"))
    # As much again stays free: others need room too.
    return "memmap" if 2 * dataset.array_bytes <= shutil.disk_usage(folder).free else "stream"


def open_latents(dataset: LatentDataset, place: Backend, *, seed: int, shuffle_rows: int) -> Latents:
    """Open a data set for training. shuffle_rows: images among which a stream is shuffled."""
    if place == "stream":
        shard_rows = [shard["rows"] for shard in dataset.manifest["shards"]]
        return ShardStream(dataset, WindowOrder(shard_rows, shuffle_rows, seed))
    arrays = dataset.arrays if place == "memory" else mapped(dataset, Path(storage.cache_folder("latents")))
    return ArrayLatents(arrays, EpochOrder(len(arrays.labels), seed))


class ArrayLatents:
    """Latents in arrays, in memory or mapped from a file."""

    def __init__(self, arrays: LatentArrays, order: EpochOrder):
        self.arrays, self.order = arrays, order
        channels, height, width = arrays.moments.shape[1:]
        self.latent_shape = (channels // 2, height, width)

    def read(self, rows: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.arrays.labels[rows], self.arrays.chosen(rows, mirrored)

    def ahead(self, place: int) -> None:
        pass


class ShardStream:
    """Latents in the shards of a data set, of which those of two windows are held in memory."""

    def __init__(self, dataset: LatentDataset, order: WindowOrder):
        self.dataset, self.order, self.latent_shape = dataset, order, dataset.latent_shape
        self._held: dict[int, Future[LatentArrays]] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="latents")

    def read(self, rows: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards = self.order.shards_of(rows)
        labels = np.empty(len(rows), np.int64)
        moments = np.empty((len(rows), *self.dataset.manifest["moments_shape"]), np.float16)
        for shard in np.unique(shards).tolist():
            of_shard = shards == shard
            within = rows[of_shard] - self.order.starts[shard]
            arrays = self._shard(shard).result()
            labels[of_shard] = arrays.labels[within]
            moments[of_shard] = arrays.chosen(within, mirrored[of_shard])
        return labels, moments

    def ahead(self, place: int) -> None:
        needed = {shard for window in self.order.windows_from(place) for shard in window}
        self._held = {shard: held for shard, held in self._held.items() if shard in needed}
        for shard in needed:
            self._shard(shard)

    def _shard(self, shard: int) -> "Future[LatentArrays]":
        if shard not in self._held:
            self._held[shard] = self._pool.submit(self.dataset.shard_arrays, shard)
        return self._held[shard]


def mapped(dataset: LatentDataset, cache: Path) -> LatentArrays:
    """The data set as arrays mapped from files below `cache`, written once by whichever worker of a node is first."""
    folder = cache / dataset.fingerprint
    lock = cache / f"{dataset.fingerprint}.lock"
    cache.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with storage.lock(str(lock)):
        if not folder.is_dir():
            storage.remove_stale_temporaries(str(cache))
            with storage.temporary_path(str(cache), dataset.array_bytes) as temporary:
                _write_arrays(dataset, Path(temporary))
                os.rename(temporary, folder)
    flip = folder / "moments_flip.npy"
    return LatentArrays(
        labels=np.load(folder / "labels.npy"),
        moments=np.load(folder / "moments.npy", mmap_mode="r"),
        moments_flip=np.load(flip, mmap_mode="r") if flip.is_file() else None,
    )


def _write_arrays(dataset: LatentDataset, folder: Path) -> None:
    folder.mkdir()
    shape = (len(dataset), *dataset.manifest["moments_shape"])
    names = ["moments", "moments_flip"] if dataset.has_flip else ["moments"]
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
        for name in names
    }
    labels, start = np.empty(len(dataset), np.int64), 0
    for number in range(len(dataset.manifest["shards"])):
        arrays = dataset.shard_arrays(number)
        stop = start + len(arrays.labels)
        labels[start:stop] = arrays.labels
        for name, file in files.items():
            file[start:stop] = getattr(arrays, name)
        start = stop
    for file in files.values():
        file.flush()
    np.save(folder / "labels.npy", labels)
