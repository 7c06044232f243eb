"""Memory of the encode job as its data set grows: driver and object store at 10,000 and 50,000 images.

pytest -m benchmark tests/benchmarks/test_encode_memory.py -s
"""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from cifar import cifar_images
from harness import say
from tiny_encode import autoencoder_folder

from pipelines.encode import encode
from pipelines.recipe_file import validate_recipe
from pipelines.stage import StageContext

pytestmark = pytest.mark.benchmark
MIB = 2**20


def benchmark_recipe(folder, images, autoencoder, **encode_settings):
    """A recipe that is all defaults but for what is measured."""
    return validate_recipe(
        {
            "name": "benchmark",
            "output": str(folder / "output"),
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
            "images": {"path": str(images), "size": 64},
            "autoencoder": {"id": str(autoencoder)},
            "encode": encode_settings,
            "model": {"name": "DiT-S/2"},
        }
    )


@dataclass
class Peaks:
    """Most memory seen, in bytes."""

    driver: int = 0
    object_store: int = 0
    spilled: int = 0
    seen: list[int] = field(default_factory=list)


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
                peaks.seen.append(store.object_store_bytes_used)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("num_images", [10_000, 50_000])
def test_memory_does_not_grow_with_the_data_set(tmp_path, num_images):
    images = cifar_images(tmp_path / "images.parquet", num_images)
    config = benchmark_recipe(tmp_path, images, autoencoder_folder(tmp_path / "autoencoder"))
    with watched() as peaks, StageContext(config) as context:
        started = time.perf_counter()
        dataset = encode(config, context=context)
        seconds = time.perf_counter() - started
    assert len(dataset) == num_images
    print([round(s / MIB) for s in peaks.seen[::20]])
    say(
        f"\n{num_images:,} images in {seconds:.0f} s: driver {peaks.driver / MIB:.0f} MiB, object store "
        f"{peaks.object_store / MIB:.0f} MiB, spilled {peaks.spilled / MIB:.0f} MiB"
    )
