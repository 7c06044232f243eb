"""CPU, memory and GPUs while a stage runs, told to its run like every other metric.

MLflow's own recorder is a second writer, which knows this machine alone and stops a stage where a server is away.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.usage import cpu_times, machine_usage, other_nodes_usage

PREFIX = "system/"
"""What MLflow's UI shows on a page of its own."""
FIRST_SECONDS = 10.0
"""A stage that takes less has no such metrics."""
SHARE = 0.01
"""Pauses grow with the time that has passed: in a day 550 points, not 8,640."""


@contextmanager
def system_metrics(run) -> Iterator[None]:
    """Tell a RunLog how busy machines are until the block ends: this one, and the other nodes by their addresses."""
    ended = threading.Event()
    thread = threading.Thread(target=_record, args=(run, ended), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _record(run, ended: threading.Event) -> None:
    try:
        begun, since = time.monotonic(), cpu_times()
        while not ended.wait(pause(time.monotonic() - begun)):
            metrics = {f"{PREFIX}{name}": value for name, value in machine_usage(since).items()}
            since = cpu_times()
            for node, usage in other_nodes_usage().items():
                metrics |= {f"{PREFIX}{node}/{name}": value for name, value in usage.items()}
            run.metrics(metrics, int(time.monotonic() - begun))
    except Exception:  # work is worth more than a picture of its machines
        logging.getLogger(__name__).warning("no more system metrics of this stage", exc_info=True)


def pause(seconds: float) -> float:
    """Seconds to the next point of a stage that runs for so long."""
    return max(FIRST_SECONDS, SHARE * seconds)
