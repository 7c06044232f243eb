"""What the writer asks of MLflow when it fails, or has lost something: on a client that answers nothing by itself."""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from pipelines.tracking import mlflow_writer
from pipelines.tracking.journal import Refused
from pipelines.tracking.mlflow_writer import MAX_ATTEMPTS, MlflowWriter

IDS = {"run r": "1", "experiment r": "0"}


@pytest.fixture
def write(monkeypatch):
    """Deliver entries by a writer with a client of the given methods."""
    monkeypatch.setattr(mlflow_writer, "check_tracking", lambda uri: "1 experiment")
    writer = MlflowWriter("http://store", print, lambda path: path)

    def deliver(entries, ids=IDS, **methods):
        active = SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))
        writer._client = SimpleNamespace(**{"get_run": lambda run: active} | methods)
        return writer.deliver(entries, ids, list)

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


def test_a_model_that_was_deleted_is_logged_anew(write):
    """Nothing else would make the checkpoint known again, and it could not be promoted."""
    logged = []

    def create(experiment, name, **further):
        logged.append(name)
        return SimpleNamespace(model_id="m-new")

    def get_run(run_id):
        read = SimpleNamespace(model_outputs=[], model_inputs=[])
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"), outputs=read, inputs=read)

    def get_logged_model(model_id):
        raise MlflowException("deleted", error_code=RESOURCE_DOES_NOT_EXIST)

    methods = {
        "get_logged_model": get_logged_model,
        "search_logged_models": lambda experiments, filter_string: [],
        "create_logged_model": create,
        "finalize_logged_model": lambda model_id, status: SimpleNamespace(model_id=model_id),
        "get_run": get_run,
        "log_outputs": lambda run_id, models: logged.append(models[0].model_id),
    }
    entry = {"op": "model", "run": "r", "digest": "d", "name": "step_2", "step": 2, "params": {}, "tags": {}}
    ids = {**IDS, "model d": "m-deleted"}
    assert write([entry], ids=ids, **methods) == 1
    assert logged == ["step_2", "m-new"] and ids["model d"] == "m-new"
    assert write([{"op": "model_removed", "run": "r", "digest": "d"}], ids=ids, **methods) == 1


def test_a_description_that_a_database_has_no_room_for_is_cut(write):
    """MLflow cuts the tags of every request but that which creates a run."""
    created = []

    def create_run(experiment, start_time, tags, run_name):
        created.append(tags)
        return SimpleNamespace(info=SimpleNamespace(run_id="2"))

    entry = {"op": "run", "run": "new", "time": 0, "name": "train", "parent": None}
    entry["tags"] = {"raydit.output": "s3://bucket/out", "mlflow.note.content": "x" * 9000}
    ids = {"experiment new": "0"}
    assert write([entry], ids=ids, create_run=create_run, search_runs=lambda *_, **__: []) == 1 and len(ids) == 2
    (tags,) = created
    assert tags["mlflow.note.content"] == "x" * 7997 + "..." and tags["raydit.output"] == "s3://bucket/out"
