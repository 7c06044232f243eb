"""Tracking on a real MLflow: a database file, and a server that comes late."""

import json
import os
import sqlite3
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer, close_delivered, free_port, wait_until
from PIL import Image

from pipelines.config.reader import load_recipe, resolved
from pipelines.registry.queries import list_runs
from pipelines.tracking.journal import Journal
from pipelines.tracking.run_log import flatten
from pipelines.tracking.store import tracking_uri
from pipelines.tracking.tracker import Tracker

TINY = "tests/recipes/tiny.toml"
DIGEST = "0123456789abcdef" * 4
MLFLOW_DIGEST = DIGEST[:36]  # as much of it as MLflow keeps


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test may depend on, or write into, the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (0.2,))


@pytest.fixture(scope="module")
def client(store):
    return MlflowClient(store)


class Project:
    """A recipe whose runs go to `uri`, in an experiment and an output folder of its own."""

    def __init__(self, root, folder, uri):
        self.name, self.uri = folder.name, uri
        settings = (f"name={self.name}", f"output={folder}", f"tracking.uri={uri}")
        self.config = load_recipe(root / TINY, settings)

    def open(self):
        return Tracker.open(self.config)

    def runs(self, client):
        experiment = client.get_experiment_by_name(self.name)
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


@pytest.fixture
def project(request, tmp_path, store):
    return Project(request.config.rootpath, tmp_path, store)


def test_the_recipes_uri_goes_over_the_variable_and_both_over_the_default(monkeypatch, tmp_path):
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://variable:1")
    assert tracking_uri() == "http://variable:1"
    assert tracking_uri("http://recipe:1") == "http://recipe:1"


def test_settings_are_flattened_and_what_is_not_set_left_out():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [2]}) == {"a.b.c": "1", "e": "[2]"}


def test_a_pipeline_and_its_stage_become_parent_and_child(project, client, monkeypatch):
    job = {"metadata": {"job_submission_id": "raydit-run-tiny-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    tracker = project.open()
    parent = tracker.start_run("pipeline", {"seed": 0})
    child = tracker.start_run("train", {"seed": 0}, parent=parent, run_tags={"raydit.latents_fingerprint": "f1"})
    child.params(resolved(project.config))
    child.tag("raydit.checkpoint", "here")
    for step in (2, 4):
        child.metrics({"train/loss": 1 / step, "train/images_per_second": 8.0}, step)
    child.input(name="latents", digest=DIGEST, source="/latents", context="training")
    child.end("FINISHED")
    parent.end("FINISHED")
    close_delivered(tracker)

    (first, second) = project.runs(client)
    pipeline, train = (first, second) if first.data.tags["raydit.stage"] == "pipeline" else (second, first)
    assert {pipeline.info.status, train.info.status} == {"FINISHED"}
    assert train.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert "mlflow.parentRunId" not in pipeline.data.tags
    assert {name: value for name, value in train.data.tags.items() if name.startswith("raydit.")} == {
        "raydit.stage": "train",
        "raydit.job_id": "raydit-run-tiny-1",
        "raydit.latents_fingerprint": "f1",
        "raydit.checkpoint": "here",
    }
    assert train.data.params["train.global_batch_size"] == "8"
    assert train.data.params["autoencoder.train.width"] == "8"
    history = client.get_metric_history(train.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (4, 0.25)]
    assert train.data.metrics["train/images_per_second"] == 8.0
    (read,) = train.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("latents", MLFLOW_DIGEST)
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]


def test_a_run_that_a_killed_process_left_open_is_closed_unless_it_goes_on(project, client, monkeypatch):
    def status():
        return {run.data.tags["raydit.stage"]: run.info.status for run in project.runs(client)}

    tracker = project.open()
    for stage in ("pipeline", "encode"):
        tracker.start_run(stage, {})
    close_delivered(tracker)  # without the ends of its runs, as a killed process leaves it
    later = SimpleNamespace(time=lambda: time.time() + 3600, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr("pipelines.tracking.tracker.time", later)  # of the end, nothing is known but the last entry
    assert status() == {"pipeline": "RUNNING", "encode": "RUNNING"}
    assert Tracker.has_waiting(project.config)
    tracker = project.open()
    tracker.start_run("encode", {})
    close_delivered(tracker)
    assert status() == {"pipeline": "KILLED", "encode": "RUNNING"}
    assert all(run.info.end_time - run.info.start_time < 1000 for run in project.runs(client) if run.info.end_time)
    shown = {run["stage"]: run["seconds"] for run in list_runs(project.uri, experiment=project.name)}
    assert shown["encode"] is None and shown["pipeline"] is not None
    tracker = project.open()
    tracker.start_run("encode", {}).end("FINISHED")
    close_delivered(tracker)
    assert status() == {"pipeline": "KILLED", "encode": "FINISHED"}
    assert not Tracker.has_waiting(project.config)


def test_what_an_answering_store_never_takes_does_not_hold_up_the_rest(project, client, store, capsys):
    """A database in which no data set can be written answers every other question."""
    database = sqlite3.connect(store.removeprefix("sqlite:///"))
    database.execute("CREATE TRIGGER broken BEFORE INSERT ON datasets BEGIN INSERT INTO nowhere VALUES (1); END")
    try:
        tracker = project.open()
        run = tracker.start_run("train", {})
        run.input(name="latents", digest=DIGEST, source="/latents", context="training")
        run.metrics({"train/loss": 0.5}, 2)
        close_delivered(tracker)
    finally:
        database.execute("DROP TRIGGER broken")
    assert "input of train-" in capsys.readouterr().out
    (told,) = project.runs(client)
    assert (told.data.metrics, told.inputs.dataset_inputs) == ({"train/loss": 0.5}, [])


def test_files_and_pictures_are_kept_beside_the_database(project, client, store, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    tracker = project.open()
    run = tracker.start_run("evaluate", {})
    run.artifact(tmp_path / "report.json")
    run.artifact(tmp_path / "never written")
    run.image(tmp_path / "grid.png", "samples", 6)
    run.end("FINISHED")
    close_delivered(tracker)

    (run,) = project.runs(client)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"report.json", "images"}
    (picture,) = [file.path for file in client.list_artifacts(run.info.run_id, "images") if ".png" in file.path]
    assert "samples" in picture and "step%6" in picture.replace("+", "%")
    assert os.path.dirname(store.removeprefix("sqlite:///")) in run.info.artifact_uri
    assert not (tmp_path / "mlruns").exists()


def test_a_checkpoint_told_twice_is_one_model_that_carries_its_metrics(project, client):
    def tell(run):
        run.model(DIGEST, name=f"{project.name}-step_6", step=6, params={"model": {"depth": 2}}, tags={"a": "b"})

    tracker = project.open()
    train = tracker.start_run("train", {})
    tell(train)
    train.end("FINISHED")
    close_delivered(tracker)
    tracker = project.open()  # another process
    evaluate = tracker.start_run("evaluate", {})
    tell(evaluate)
    evaluate.metrics({"eval/fid_50k": 12.5}, 6, model=DIGEST, dataset=("reference", DIGEST))
    evaluate.metrics({"floor/fid_50k": 1.5}, 6)
    evaluate.end("FINISHED")
    close_delivered(tracker)

    experiment = client.get_experiment_by_name(project.name).experiment_id
    (model,) = client.search_logged_models([experiment])
    assert (model.name, model.status, model.model_type) == (f"{project.name}-step_6", "READY", "raydit.checkpoint")
    assert (model.params, model.tags["a"]) == ({"model.depth": "2"}, "b")
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.step) == ("eval/fid_50k", 12.5, 6)
    assert (metric.dataset_name, metric.dataset_digest) == ("reference", MLFLOW_DIGEST)
    (train_run,) = [run for run in project.runs(client) if run.data.tags["raydit.stage"] == "train"]
    assert [(output.model_id, output.step) for output in train_run.outputs.model_outputs] == [(model.model_id, 6)]

    def models_below(value, digest):
        return client.search_logged_models(
            [experiment],
            filter_string=f"metrics.`eval/fid_50k` < {value}",
            datasets=[{"dataset_name": "reference", "dataset_digest": digest}],
        )

    assert [found.model_id for found in models_below(60, MLFLOW_DIGEST)] == [model.model_id]
    assert len(models_below(12, MLFLOW_DIGEST)) == len(models_below(60, "another")) == 0


def test_an_ended_run_is_not_taken_up_again(project, client):
    for _ in range(2):
        tracker = project.open()
        tracker.start_run("encode", {"seed": 0}).end("FINISHED")
        close_delivered(tracker)
    tracker = project.open()
    tracker.start_run("encode", {"seed": 1}).end("FINISHED")
    close_delivered(tracker)
    runs = project.runs(client)
    names = [run.info.run_name for run in runs]
    assert len({run.info.run_id for run in runs}) == 3
    assert sum(name.endswith("-2") for name in names) == 1
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize("ending", ["KILLED", "FAILED", None])
def test_a_run_that_was_cut_off_is_taken_up_again(project, client, monkeypatch, ending):
    """None: the process died without a word."""
    tracker = project.open()
    run = tracker.start_run("train", {})
    run.metrics({"train/loss": 1.0}, 2)
    if ending:
        run.end(ending)
    close_delivered(tracker)
    (cut_off,) = project.runs(client)
    assert cut_off.info.status == (ending or "RUNNING")

    job = {"metadata": {"job_submission_id": "second"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    tracker = project.open()
    run = tracker.start_run("train", {})
    close_delivered(tracker)
    (again,) = project.runs(client)
    assert (again.info.run_id, again.info.status) == (cut_off.info.run_id, "RUNNING")
    assert again.data.tags["raydit.job_id"] == "second"

    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    tracker = project.open()
    run = tracker.start_run("train", {})
    run.metrics({"train/loss": 0.5}, 4)
    run.end("FINISHED")
    close_delivered(tracker)
    (ended,) = project.runs(client)
    assert (ended.info.run_id, ended.info.status) == (cut_off.info.run_id, "FINISHED")
    assert ended.info.start_time == cut_off.info.start_time
    assert ended.info.end_time > (cut_off.info.end_time or 0)
    assert ended.data.tags["raydit.job_id"] == ""  # that job's end must not end a run that goes on without it
    assert [point.step for point in client.get_metric_history(ended.info.run_id, "train/loss")] == [2, 4]


@pytest.mark.parametrize("ending", ["FAILED", None])
def test_work_that_starts_over_is_a_new_run_and_the_earlier_one_is_closed(project, client, ending):
    """None: the process of the first attempt died without a word."""
    tracker = project.open()
    first = tracker.start_run("train", {}, resumes="")
    again = tracker.start_run("train", {}, resumes="")  # there is nothing of the first attempt yet
    assert again.key == first.key
    again.metrics({"train/loss": 1.0}, 2540)
    if ending:
        again.end(ending)
    close_delivered(tracker)
    tracker = project.open()
    second = tracker.start_run("train", {}, resumes="")
    second.metrics({"train/loss": 1.0}, 20)
    close_delivered(tracker)
    tracker = project.open()
    assert tracker.start_run("train", {}, resumes=second.key).key == second.key
    assert tracker.start_run("train", {}).key == second.key  # of an older version, which does not record the key
    assert tracker.start_run("train", {}, resumes=first.key).key == first.key  # its checkpoints were taken back
    tracker.start_run("train", {}, resumes=second.key).end("FINISHED")
    close_delivered(tracker)
    tracker = project.open()
    assert tracker.start_run("train", {}, resumes=second.key).key == f"{first.key}-3"  # more steps of a finished one
    close_delivered(tracker)
    steps = [
        [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        for run in project.runs(client)
    ]
    assert sorted(steps) == [[], [20], [2540]]


@pytest.mark.parametrize(("output", "num_runs"), [("s3://bucket/out", 1), ("/data/out", 2)])
def test_a_run_whose_journal_is_lost_is_taken_up_where_nobody_else_can_run_it(
    project, client, monkeypatch, tmp_path, output, num_runs
):
    for machine in ("first", "second"):
        monkeypatch.setattr(project, "config", replace(project.config, output=str(tmp_path / machine)))
        tracker = project.open()
        run = tracker.start_run("train", {}, run_tags={"raydit.output": output})
        run.tag("machine", machine)
        if machine == "second":
            run.end("FINISHED")
        close_delivered(tracker)
    runs = project.runs(client)
    assert len(runs) == num_runs
    assert (runs[-1].info.status, runs[-1].data.tags["machine"]) == ("FINISHED", "second")


def test_a_refused_entry_is_said_and_holds_nothing_up(project, client, capsys, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no picture")

    Image.new("RGB", (4, 4)).save(tmp_path / "broken.png")
    log_image = MlflowClient.log_image
    monkeypatch.setattr(MlflowClient, "log_image", fail)
    tracker = project.open()
    run = tracker.start_run("train", {})
    for step in range(30):
        run.image(tmp_path / "broken.png", "samples", step)
    run.metrics({"train/loss": 1.0}, 2)
    run.end("FINISHED")
    close_delivered(tracker)
    (ended,) = project.runs(client)
    assert (ended.info.status, ended.data.metrics) == ("FINISHED", {"train/loss": 1.0})
    first, last = capsys.readouterr().out.splitlines()
    assert f"MLflow refuses image of {run.key}: ValueError: no picture" in first
    assert f"kept in {tracker._journal.refused_path}; when the cause is removed, `raydit runs deliver" in first
    assert "MLflow refused 30 entries in all" in last
    assert len(tracker._journal.refused_path.read_text().splitlines()) == 30

    monkeypatch.setattr(MlflowClient, "log_image", log_image)
    assert tracker._journal.retry_refused() == (30, 0)
    assert len(client.list_artifacts(ended.info.run_id, "images")) == 60  # each with a small copy of itself


def test_scores_of_a_checkpoint_without_a_model_are_those_of_the_run(project, client, capsys):
    tracker = project.open()
    run = tracker.start_run("evaluate", {})
    run.metrics({"eval/fid": 1.0}, 2, model="never told", dataset=("reference", DIGEST))
    run.model_removed("never told")
    close_delivered(tracker)
    (run,) = project.runs(client)
    assert run.data.metrics == {"eval/fid": 1.0} and capsys.readouterr().out == ""


def test_settings_may_change_and_params_of_an_older_version_are_left_as_they_are(project, client, capsys):
    """An older version logged every setting as a param."""
    tracker = project.open()
    run = tracker.start_run("train", {})
    run.params({"seed": 0, "train": {"num_workers": 2, "width": 8}})
    run.settings({"train": {"log_every": 20}})
    run.params({"seed": 0, "train": {"num_workers": 4, "width": 8}})
    run.settings({"train": {"log_every": 5}})
    close_delivered(tracker)
    (run,) = project.runs(client)
    assert run.data.params == {"seed": "0", "train.num_workers": "2", "train.width": "8"}
    assert run.data.tags["raydit.setting.train.num_workers"] == "4"
    assert run.data.tags["raydit.setting.train.log_every"] == "5"
    assert "raydit.setting.seed" not in run.data.tags and capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_server_that_comes_late_gets_everything_in_order(request, tmp_path, store, client, capsys):
    port = free_port()
    project = Project(request.config.rootpath, tmp_path, f"http://127.0.0.1:{port}")
    (tmp_path / "report.json").write_text("{}")
    tracker = project.open()
    run = tracker.start_run("train", {})
    run.params({"seed": 0})
    for step in range(50):
        run.metrics({"train/loss": float(step)}, step)
    run.artifact(tmp_path / "report.json")
    run.model(DIGEST, name="step_6", step=6, params={}, tags={})
    run.metrics({"eval/fid_50k": 12.5}, 6, model=DIGEST, dataset=("reference", DIGEST))
    run.tag("a*b", "no name")  # refused, by a server too
    run.end("FINISHED")
    wait_until(lambda: "does not answer" in capsys.readouterr().out)
    with MlflowServer(store, port, tmp_path):
        close_delivered(tracker)
        (run,) = project.runs(client)
        assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "0"})
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(50)]
        remote = MlflowClient(project.uri)
        assert [file.path for file in remote.list_artifacts(run.info.run_id)] == ["report.json"]
        (model,) = remote.search_logged_models([run.info.experiment_id])
        assert [metric.value for metric in model.metrics] == [12.5]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "MLflow refuses tag of" in said[0], said


def test_what_a_server_never_took_is_delivered_by_the_next_command(project, client, monkeypatch, capsys):
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "create_run", unreachable)
        tracker = project.open()
        tracker.start_run("encode", {}).end("FINISHED")
        tracker.close()
    assert "has not taken everything yet" in capsys.readouterr().out
    close_delivered(project.open())
    (run,) = project.runs(client)
    assert (run.data.tags["raydit.stage"], run.info.status) == ("encode", "FINISHED")


def unreachable(*args, **kwargs):
    raise ConnectionRefusedError("down")
