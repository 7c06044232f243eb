"""CPU, memory and GPU usage while a stage runs, logged to its run like every other metric.

MLflow's own recorder would be a second writer. It sees this machine only, and stops a stage if the server is down.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.threads import run_beside
from cluster.usage import measure_other_nodes, measure_usage, start_measuring_cpu
from pipelines.tracking.run_log import SYSTEM, RunLog

FIRST_SECONDS = 10.0
"""Seconds before the first point: shorter stages have none."""
SHARE = 0.01
"""Pauses grow with the elapsed time by this share of it: a day has 550 points instead of 8,640."""


@contextmanager
def system_metrics(run: RunLog) -> Iterator[None]:
    """Log the usage of this machine, and of the other nodes by their addresses, until the block ends."""
    with run_beside("system-metrics", _record, run):
        yield


def _record(run: RunLog, ended: threading.Event) -> None:
    try:
        begun = time.monotonic()
        start_measuring_cpu()
        while not ended.wait(pause(time.monotonic() - begun)):
            metrics = {f"{SYSTEM}{name}": value for name, value in measure_usage().items()}
            for node, usage in measure_other_nodes().items():
                metrics |= {f"{SYSTEM}{node}/{name}": value for name, value in usage.items()}
            run.metrics(metrics, int(time.monotonic() - begun))
    except Exception:  # a stage must not fail because its machine cannot be measured
        logging.getLogger(__name__).warning("no more system metrics of this stage", exc_info=True)


def pause(seconds: float) -> float:
    """Return the seconds until the next point of a stage that has run for `seconds`."""
    return max(FIRST_SECONDS, SHARE * seconds)
