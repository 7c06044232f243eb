"""Memory of the encode job as its data set grows: driver and object store at 10,000 and 50,000 images.

pytest -m benchmark tests/benchmarks/test_encode_memory.py -s
"""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from cifar import cifar_images, cifar_recipe
from harness import say
from tiny_encode import autoencoder_folder

from pipelines.encode import encode
from pipelines.stage import StageContext

pytestmark = pytest.mark.benchmark
MIB = 2**20
SIZES = (10_000, 50_000)
SLACK = 32 * MIB
"""More than a shard of images and moments: what is in flight varies by chance."""


@dataclass
class Peaks:
    """Most memory seen, in bytes."""

    driver: int = 0
    object_store: int = 0
    spilled: int = 0


@contextmanager
def watched():
    """Peaks of this process and of the running Ray's object store, looked at ten times a second."""
    import psutil
    import ray
    from ray._private.internal_api import node_stats

    peaks, ended, me = Peaks(), threading.Event(), psutil.Process()

    def watch():
        while not ended.wait(0.1):
            peaks.driver = max(peaks.driver, me.memory_info().rss)
            if ray.is_initialized() and (nodes := ray.nodes()):
                address, port = nodes[0]["NodeManagerAddress"], nodes[0]["NodeManagerPort"]
                store = node_stats(address, port, include_memory_info=False).store_stats
                peaks.object_store = max(peaks.object_store, store.object_store_bytes_used)
                peaks.spilled = max(peaks.spilled, store.spilled_bytes_total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    autoencoder = autoencoder_folder(tmp_path / "autoencoder")
    found = []
    for size in SIZES:
        images = cifar_images(tmp_path / "images.parquet", size)
        config = cifar_recipe(tmp_path / str(size), images, autoencoder)
        with StageContext(config) as context, watched() as peaks:
            started = time.perf_counter()
            dataset = encode(config, context=context)
            seconds = time.perf_counter() - started
        assert len(dataset) == size
        say(
            f"\n{size:,} images in {seconds:.0f} s: driver {peaks.driver / MIB:.0f} MiB, object store "
            f"{peaks.object_store / MIB:.0f} MiB, spilled {peaks.spilled / MIB:.0f} MiB"
        )
        found.append(peaks)
    few, many = found
    assert many.spilled == 0
    assert few.object_store > 0, "nothing was watched"
    assert many.object_store <= 1.5 * few.object_store + SLACK
