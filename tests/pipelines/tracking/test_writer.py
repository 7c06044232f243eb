"""What the writer asks of MLflow when it fails, or has lost something: on a client that answers nothing by itself."""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from PIL import Image

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
        return SimpleNamespace(model_id="m-new", status="PENDING", metrics=None)

    def get_run(run_id):
        read = SimpleNamespace(model_outputs=[], model_inputs=[])
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"), outputs=read, inputs=read)

    def get_logged_model(model_id):
        raise MlflowException("deleted", error_code=RESOURCE_DOES_NOT_EXIST)

    methods = {
        "get_logged_model": get_logged_model,
        "search_logged_models": lambda experiments, filter_string: [],
        "create_logged_model": create,
        "finalize_logged_model": lambda model_id, status: logged.append(status),
        "get_run": get_run,
        "log_outputs": lambda run_id, models: logged.append(models[0].model_id),
    }
    entry = {"op": "model", "run": "r", "digest": "d", "name": "step_2", "step": 2, "params": {}, "tags": {}}
    ids = {**IDS, "model d": "m-deleted"}
    assert write([entry], ids=ids, **methods) == 1
    assert logged == ["step_2", "READY", "m-new"] and ids["model d"] == "m-new"
    assert write([{"op": "model_removed", "run": "r", "digest": "d"}], ids=ids, **methods) == 1


@pytest.mark.parametrize(("op", "code", "refused"), [("run", 2, False), ("run", 1, True), ("tag", 2, True)])
def test_a_run_is_waited_for_while_a_database_cannot_write(write, op, code, refused):
    """All that follows of the run would be refused with it. The code of an unknown failure, 1, may mean anything."""

    def fail(*arguments, **options):
        raise MlflowException("database or disk is full", error_code=code)

    entry = {"op": op, "run": "new", "time": 0, "name": "train", "value": "", "parent": None, "tags": {}}
    methods = {"create_run": fail, "set_tag": fail, "search_runs": lambda *_, **__: []}
    ids = {"experiment new": "0"} | ({} if op == "run" else {"run new": "1"})
    for _ in range(MAX_ATTEMPTS - 1):
        with pytest.raises(ConnectionError):
            write([entry], ids=ids, **methods)
    with pytest.raises(Refused if refused else ConnectionError, match="disk is full"):
        write([entry], ids=ids, **methods)


def test_a_model_that_a_kill_left_pending_is_finalized(write):
    read = SimpleNamespace(model_outputs=[SimpleNamespace(model_id="m-1")], model_inputs=[])
    finalized = []
    methods = {
        "get_logged_model": lambda model_id: SimpleNamespace(model_id="m-1", status="PENDING", experiment_id="0"),
        "get_run": lambda run_id: SimpleNamespace(outputs=read, inputs=None),
        "finalize_logged_model": lambda *arguments: finalized.append(arguments),
    }
    entry = {"op": "model", "run": "r", "digest": "d", "name": "step_2", "step": 2, "params": {}, "tags": {}}
    assert write([entry], ids={**IDS, "model d": "m-1"}, **methods) == 1
    assert finalized == [("m-1", "READY")]


def test_a_model_of_another_experiment_is_not_taken_for_this_ones(write):
    """The recipe was renamed, or its experiment was deleted by another command."""
    created = []
    read = SimpleNamespace(model_outputs=[], model_inputs=[])

    def create(experiment, **further):
        created.append(experiment)
        return SimpleNamespace(model_id="m-here", status="READY", metrics=[])

    methods = {
        "get_logged_model": lambda model_id: SimpleNamespace(model_id="m-there", status="READY", experiment_id="9"),
        "search_logged_models": lambda experiments, filter_string: [],
        "create_logged_model": create,
        "get_run": lambda run_id: SimpleNamespace(outputs=read, inputs=read),
        "log_outputs": lambda run_id, models: None,
    }
    entry = {"op": "model", "run": "r", "digest": "d", "name": "step_2", "step": 2, "params": {}, "tags": {}}
    ids = {**IDS, "model d": "m-there"}
    assert write([entry], ids=ids, **methods) == 1
    assert (created, ids["model d"]) == (["0"], "m-here")


def test_a_picture_without_its_small_copy_is_logged_again(write, tmp_path):
    """A kill in the middle leaves the picture alone, which MLflow's UI then does not show."""
    name = "images/samples+step+2+timestamp+5+1b4e.png"
    found, logged = [SimpleNamespace(path=name)], []
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    entry = {"op": "image", "run": "r", "path": str(tmp_path / "grid.png"), "key": "samples", "step": 2, "time": 5}
    methods = {
        "list_artifacts": lambda run_id, folder: found,
        "log_image": lambda run_id, image, **options: logged.append(options["step"]),
    }
    assert write([entry], **methods) == 1 and logged == [2]
    found.append(SimpleNamespace(path=name.replace(".png", "+compressed.webp")))
    assert write([entry], **methods) == 1 and logged == [2]


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
