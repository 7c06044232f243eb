"""Peak memory of a job's driver and of Ray's object store while the job runs."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

MIB = 2**20


@dataclass
class PeakMemory:
    """Peak memory, in bytes."""

    driver: int = 0
    object_store: int = 0
    spilled: int = 0


@contextmanager
def measure_peak_memory():
    """Measure peak memory during a block, sampled ten times a second: of this process, above its initial memory, and of
    Ray's object store."""
    import psutil
    import ray
    from ray._private.internal_api import node_stats

    peaks, ended, process = PeakMemory(), threading.Event(), psutil.Process()
    before = process.memory_info().rss

    def sample():
        while not ended.wait(0.1):
            peaks.driver = max(peaks.driver, process.memory_info().rss - before)
            if ray.is_initialized() and (nodes := ray.nodes()):
                address, port = nodes[0]["NodeManagerAddress"], nodes[0]["NodeManagerPort"]
                store = node_stats(address, port, include_memory_info=False).store_stats
                peaks.object_store = max(peaks.object_store, store.object_store_bytes_used)
                peaks.spilled = max(peaks.spilled, store.spilled_bytes_total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
