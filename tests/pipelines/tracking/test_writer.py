"""What the writer asks of MLflow when it fails, or has lost something: on a client that answers nothing by itself."""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from pipelines.tracking import mlflow_writer
from pipelines.tracking.journal import Refused
from pipelines.tracking.mlflow_writer import MAX_ATTEMPTS, MlflowWriter

IDS = {"run r": "1", "experiment r": "0"}


@pytest.fixture
def write(monkeypatch):
    """Deliver entries by a writer with a client of the given methods."""
    monkeypatch.setattr(mlflow_writer, "check_tracking", lambda uri: "1 experiment")
    writer = MlflowWriter("http://store", print, lambda path: path)

    def deliver(entries, **methods):
        writer._client = SimpleNamespace(
            get_run=lambda run: SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active")), **methods
        )
        return writer.deliver(entries, dict(IDS), list)

    return deliver


def point(step, name="train/loss"):
    return {"op": "metrics", "run": "r", "time": 0, "step": step, "metrics": {name: 1.0}, "model": "", "dataset": None}


def test_a_metric_that_fails_for_ever_is_set_aside_though_others_follow_it(write):
    """Each attempt is with one metric more, as while a training goes on."""
    sent = []

    def log_batch(run_id, metrics):
        if any(metric.key == "bad" for metric in metrics):
            raise MlflowException("no row", error_code=0)
        sent.extend(metric.step for metric in metrics)

    entries = [point(0), point(1, "bad"), point(2)]
    for step in range(3, 2 + MAX_ATTEMPTS):
        with pytest.raises(ConnectionError):
            write(entries, log_batch=log_batch)
        entries.append(point(step))
    assert write(entries, log_batch=log_batch) == 1 and sent == [0]
    with pytest.raises(Refused, match="no row"):
        write(entries[1:], log_batch=log_batch)
    assert write(entries[2:], log_batch=log_batch) == len(entries) - 2
