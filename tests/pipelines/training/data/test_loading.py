"""Orders of reading shard by shard, and latents read from memory, memory-mapped files and shards."""

import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_latents import SHAPE, make_moments, write_dataset

from cluster import storage
from pipelines.config.training import TrainConfig
from pipelines.training.data import loading
from pipelines.training.data.loading import MEMORY_BYTES, choose_backend, memory_mapped_arrays, open_latent_source
from pipelines.training.data.order import WindowOrder, WorkerShare, batch_rows
from pipelines.training.group.worker import Worker
from pipelines.training.loop import open_for_training
from raydit.errors import InvalidInput, StorageFull

SHARDS = [5, 7, 6, 1, 9, 4, 8]
ROWS = sum(SHARDS)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "latents", [make_moments(rows, rows) for rows in SHARDS], flip=True)


@pytest.mark.parametrize("window_rows", [1, 8, 13, 1000])
def test_an_epoch_holds_every_row_once_and_needs_few_shards_at_a_time(window_rows):
    order = WindowOrder(SHARDS, window_rows, seed=4)
    for epoch in range(3):
        rows = order.rows(range(epoch * ROWS, (epoch + 1) * ROWS))
        assert sorted(rows) == list(range(ROWS))
        position = epoch * ROWS
        for window in order.windows(epoch):
            count = sum(SHARDS[shard] for shard in window)
            assert set(order.shards_of(rows[:count])) == set(window)
            assert (
                order.current_and_next_window(position)[0]
                == order.current_and_next_window(position + count - 1)[0]
                == window
            )
            rows, position = rows[count:], position + count
        assert order.current_and_next_window(position - 1)[1] == order.windows(epoch + 1)[0]


def test_every_window_but_the_last_holds_the_given_number_of_rows():
    order = WindowOrder(SHARDS, 13, seed=0)
    for epoch in range(20):
        sizes = [[SHARDS[shard] for shard in window] for window in order.windows(epoch)]
        assert all(sum(window) >= 13 > sum(window[:-1]) for window in sizes[:-1])


def test_shards_and_the_rows_within_a_window_are_shuffled_differently_in_every_epoch():
    order = WindowOrder(SHARDS, 13, seed=0)
    assert len({str(order.windows(epoch)) for epoch in range(10)}) > 5
    first = order.epoch_rows(0)
    assert not np.array_equal(first, np.concatenate([order._rows_of_shard(s) for w in order.windows(0) for s in w]))
    assert not np.array_equal(first, WindowOrder(SHARDS, 13, seed=1).epoch_rows(0))


def test_rows_do_not_depend_on_the_number_of_workers_or_the_first_batch():
    full = [batch_rows(WindowOrder(SHARDS, 13, 0), WorkerShare(0, 1, 10), step) for step in range(9)]
    for workers in (2, 3, 4):
        for step in reversed(range(9)):
            shares = [WorkerShare(rank, workers, 10) for rank in range(workers)]
            rows = [batch_rows(WindowOrder(SHARDS, 13, 0), share, step) for share in shares]
            np.testing.assert_array_equal(np.concatenate(rows), full[step])


@pytest.mark.parametrize("backend", ["memory", "memmap", "stream"])
def test_every_backend_reads_the_rows_of_the_data_set(dataset, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    latents = open_latent_source(dataset, backend, seed=0, shuffle_rows=13)
    assert latents.latent_shape == (2, 3, 5)
    for step in range(12):
        rows = batch_rows(latents.order, WorkerShare(0, 1, 9), step)
        flip = np.arange(9) % 3 == step % 3
        latents.prefetch(9 * step)
        moments = np.empty((len(rows), *dataset.moments_shape), np.float16)
        labels = latents.read(rows, flip, moments)
        np.testing.assert_array_equal(labels, dataset.arrays.labels[rows])
        expected = np.where(flip[:, None, None, None], dataset.arrays.moments_flip[rows], dataset.arrays.moments[rows])
        np.testing.assert_array_equal(moments, expected)


def test_a_stream_holds_two_windows_of_shards_and_no_more(dataset):
    latents = open_latent_source(dataset, "stream", seed=0, shuffle_rows=1)
    for step in range(3 * ROWS):
        latents.prefetch(step)
        moments = np.empty((1, *dataset.moments_shape), np.float16)
        latents.read(batch_rows(latents.order, WorkerShare(0, 1, 1), step), np.array([False]), moments)
        assert len(latents._held) <= 2


def test_workers_that_start_together_share_one_memory_mapped_file(dataset, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(sum_of_memory_mapped, [(dataset, tmp_path / "cache")] * 3)
    assert len({identity for _, identity in sums}) == 1
    assert all(total == dataset.arrays.moments.astype(np.float64).sum() for total, _ in sums)
    assert sorted(os.listdir(tmp_path / "cache")) == [dataset.fingerprint, f"{dataset.fingerprint}.lock"]


def test_workers_that_write_the_file_at_once_use_that_of_the_first(dataset, tmp_path, monkeypatch):
    """A file system that several nodes share may have no locks."""
    write = loading._write_arrays

    def write_after_another(*arguments):
        monkeypatch.setattr(loading, "_write_arrays", write)
        first.append(memory_mapped_arrays(dataset, tmp_path / "cache"))
        write(*arguments)

    first = []
    monkeypatch.setattr(loading, "_write_arrays", write_after_another)
    monkeypatch.setattr("cluster.storage.lock", lambda path: nullcontext())
    arrays = memory_mapped_arrays(dataset, tmp_path / "cache")
    assert arrays.moments.filename == first[0].moments.filename
    np.testing.assert_array_equal(arrays.moments, dataset.arrays.moments)
    assert sorted(os.listdir(tmp_path / "cache")) == [dataset.fingerprint, f"{dataset.fingerprint}.lock"]


def test_data_sets_that_claim_one_fingerprint_are_cached_apart(dataset, tmp_path):
    other = write_dataset(tmp_path / "other", [make_moments(ROWS, seed=7)])
    claims = type(other)(other.path, {**other.manifest, "fingerprint": dataset.fingerprint})
    for each in (dataset, claims):
        arrays = memory_mapped_arrays(each, tmp_path / "cache")
        np.testing.assert_array_equal(arrays.moments, each.arrays.moments)
    folders = {entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()}
    assert folders == {dataset.fingerprint, other.fingerprint}


def test_no_memory_mapped_copy_is_made_of_a_shard_with_other_bytes(dataset, tmp_path):
    """Training would read the copy after the shard was repaired, and no check of the shards would find it."""
    file, cache = Path(dataset.path) / dataset.shards[2].file, tmp_path / "cache"
    good, row = file.read_bytes(), dataset.arrays.moments[SHARDS[0] + SHARDS[1]].tobytes()
    assert good.count(row) == 1
    file.write_bytes(good.replace(row, bytes(len(row))))
    with pytest.raises(InvalidInput, match=f"{file}: found sha256 .* according to the manifest"):
        memory_mapped_arrays(dataset, cache)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]
    file.write_bytes(good)
    copied = memory_mapped_arrays(dataset, cache)
    np.testing.assert_array_equal(copied.moments, dataset.arrays.moments)


def test_a_full_disk_is_an_error_before_the_cache_is_mapped(tmp_path, tiny_disk):
    """Without space that is reserved, writing through memory ends the process by a signal."""
    dataset = write_dataset(tmp_path / "latents", [make_moments(3000)])
    with pytest.raises(StorageFull, match="no space left"):
        memory_mapped_arrays(dataset, tiny_disk / "cache")
    assert not [entry for entry in (tiny_disk / "cache").iterdir() if entry.is_dir()]


def sum_of_memory_mapped(dataset, cache):
    arrays = memory_mapped_arrays(dataset, cache)
    return arrays.moments.astype(np.float64).sum(), os.stat(arrays.moments.filename).st_ino


def test_the_backend_follows_from_the_size(dataset, monkeypatch):
    assert dataset.array_bytes == ROWS * int(np.prod(SHAPE)) * 2 * 2
    assert choose_backend(dataset) == "memory"
    rows = MEMORY_BYTES // (dataset.array_bytes // ROWS) + 1
    assert choose_backend(with_rows(dataset, rows)) == "memmap"
    assert choose_backend(with_rows(dataset, 10**18)) == "stream"


@pytest.fixture
def full_disk(dataset, monkeypatch, tmp_path):
    """Make the data set too large for memory and for a copy, and return the folder of copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "MEMORY_BYTES", 0)
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * dataset.array_bytes - 1)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda folder: usage)
    return Path(storage.cache_folder("latents"))


def test_a_second_training_shares_the_copy_that_has_filled_the_disk(dataset, full_disk):
    """It would read the same latents in another order than the first."""
    assert choose_backend(dataset) == "stream"
    memory_mapped_arrays(dataset, full_disk)
    assert choose_backend(dataset) == "memmap"


def test_a_second_training_waits_for_the_copy_that_is_being_made(dataset, full_disk):
    lock = full_disk / f"{dataset.fingerprint}.lock"
    full_disk.mkdir(parents=True)
    lock.touch()
    with ThreadPoolExecutor(1) as pool:
        with storage.lock(str(lock)):
            chosen = pool.submit(choose_backend, dataset)
            with pytest.raises(TimeoutError):
                chosen.result(timeout=0.1)
            (full_disk / dataset.fingerprint).mkdir()
        assert chosen.result() == "memmap"


def test_a_training_says_why_it_reads_shard_by_shard(dataset, full_disk):
    messages = []
    settings = SimpleNamespace(train=TrainConfig(shuffle_rows=13), encoding=None, seed=0)
    worker = Worker(0, 1, torch.device("cpu"), messages.append)
    streamed = open_for_training(dataset, settings, worker, None)
    (said,) = messages
    assert "'auto'" in said.text and "13 images at a time" in said.text and str(full_disk) in said.text
    resumed = SimpleNamespace(step=1, trainer_state={"order": streamed.order.describe(), "seed": 0})
    assert open_for_training(dataset, settings, worker, resumed).order.describe() == streamed.order.describe()
    assert len(messages) == 1


def with_rows(dataset, rows):
    return type(dataset)(dataset.path, {**dataset.manifest, "rows": rows})
