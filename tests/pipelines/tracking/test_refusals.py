"""Whatever a store refuses, fails with or loses, nothing of a run is lost, and one line says what became of it."""

import json
import sqlite3
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from mlflow_server import answering, close_delivered, wait_until
from PIL import Image
from sqlalchemy import event
from sqlalchemy.engine import Engine

from pipelines.config.reader import load_recipe
from pipelines.registry.best import best_checkpoints
from pipelines.registry.queries import list_runs
from pipelines.stage import StageContext
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker
from raydit.errors import InvalidInput

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (0.1,))


@pytest.fixture(scope="module")
def client(store):
    return MlflowClient(store)


@pytest.fixture
def recipe(request, tmp_path, store):
    """Return the tiny recipe with some settings, whose experiment is named after the test."""

    def load(**settings):
        given = {"name": tmp_path.name, "output": tmp_path / "output", "tracking.uri": store} | settings
        flags = [f"{key}={value}" for key, value in given.items()]
        return load_recipe(request.config.rootpath / "tests/recipes/tiny.toml", flags)

    return load


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"You are not authenticated.", "the server refuses access.*MLFLOW_TRACKING_USERNAME"),
        (403, b'{"detail": "Forbidden"}', "the server refuses access.*MLFLOW_TRACKING_USERNAME"),
        (404, b"not found", "failed with error code 404.*Set tracking.uri"),
        (200, b"<html>another server</html>", "not in a valid JSON format.*Set tracking.uri"),
    ],
)
def test_a_server_that_will_never_take_runs_is_refused_before_work_starts(recipe, status, body, message):
    with answering(status, body) as (uri, _), pytest.raises(InvalidInput, match=f"{uri} cannot be used.*{message}"):
        Tracker.open(recipe(**{"tracking.uri": uri}))


@pytest.mark.parametrize("kind", ["file://{}/mlruns", "{}/mlruns", "ftp://host{}", "sqlite:///{}/none/mlflow.db"])
def test_a_store_that_will_never_take_runs_is_refused_before_work_starts(recipe, tmp_path, kind):
    with pytest.raises(InvalidInput, match=r"tracking.uri: .*[Ss]et .* to (a database|another store)"):
        Tracker.open(recipe(**{"tracking.uri": kind.format(tmp_path)}))
    assert not (tmp_path / "output").exists() and not (tmp_path / "mlruns").exists()


def test_a_server_that_denies_access_in_the_middle_gets_everything_later(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracker_module, "CLOSE_SECONDS", 0.5)
    with answering(503, b"busy") as (uri, answer):
        tracker = Tracker.open(recipe(**{"tracking.uri": uri}))
        answer |= {"status": 401, "body": b"You are not authenticated."}
        run = tracker.start_run("train", {})
        for step in range(40):
            run.tag("step", str(step))
        tracker.close()
    first, last = capsys.readouterr().out.splitlines()
    assert f"{uri} refuses access" in first or f"{uri} does not answer" in first
    assert "41 entries wait in" in last and f"`raydit runs deliver {tmp_path}/output`, or the next raydit" in last
    assert not tracker._journal.refused_path.exists()


@pytest.fixture
def impatient():
    """MLflow waits 0.1 seconds for a locked database instead of 20."""

    def shorten(connection, cursor, statement, parameters, context, executemany):
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", shorten)


def test_a_locked_database_gets_everything_when_it_is_free_again(recipe, client, store, impatient, capfd, monkeypatch):
    """The lock lasts longer than MLflow waits for it, and longer than a command."""
    monkeypatch.setattr(tracker_module, "CLOSE_SECONDS", 2)
    config = recipe()
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        database.execute("BEGIN EXCLUSIVE")
        tracker = Tracker.open(config)
        run = tracker.start_run("train", {})
        run.metrics({"train/loss": 0.5}, 2)
        run.end("FINISHED")
        tracker.close()
        database.rollback()
    shown = capfd.readouterr()
    first, last = shown.out.splitlines()
    assert "is locked by another process; results are queued" in first and "3 entries wait" in last and shown.err == ""
    close_delivered(Tracker.open(config))
    (run,) = runs_of(client, config.name)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 0.5})


def runs_of(client, name):
    experiment = client.get_experiment_by_name(name)
    return client.search_runs([experiment.experiment_id])


def start_delivered(recipe, picture):
    """Start the runs of `train_a_little`, and wait until MLflow has them."""
    config = recipe()
    tracker = Tracker.open(config)
    pipeline, run = train_a_little(tracker, picture)
    wait_until(lambda: not tracker._journal.undelivered)
    return config, tracker, pipeline, run


def train_a_little(tracker, picture):
    """Start a pipeline and its training, and log one of everything."""
    pipeline = tracker.start_run("pipeline", {})
    run = tracker.start_run("train", {}, parent=pipeline)
    run.params({"seed": 0})
    run.metrics({"train/loss": 1.0}, 1)
    run.artifact(picture)
    run.image(picture, "samples", 1)
    run.model(DIGEST, name="step_1", step=1, params={}, tags={"raydit.checkpoint_digest": DIGEST})
    return pipeline, run


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "output" / "grid.png"
    file.parent.mkdir()
    Image.new("RGB", (4, 4)).save(file)
    return file


def assert_complete(client, run, steps):
    """The run has everything once, before and after the deletion."""
    assert run.data.params == {"seed": "0"} and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / step) for step in steps]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"grid.png", "images"}
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    (output,) = client.get_run(run.info.run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.experiment_id == run.info.experiment_id and model.name == "step_1"


def finish(config, tracker, pipeline, run, restarted):
    """Log what remains of the runs that `train_a_little` began, by another command if `restarted`."""
    if restarted:
        close_delivered(tracker)
        tracker = Tracker.open(config)
        pipeline = tracker.start_run("pipeline", {})
        run = tracker.start_run("train", {}, parent=pipeline)
    run.metrics({"train/loss": 0.5}, 2)
    run.end("FINISHED")
    pipeline.end("FINISHED")
    close_delivered(tracker)


@pytest.mark.parametrize("restarted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_deleted_run_leads_to_a_new_one_with_everything(recipe, client, picture, capsys, restarted):
    """Deleted in the middle, or between two commands."""
    config, tracker, pipeline, run = start_delivered(recipe, picture)
    (deleted,) = [each for each in runs_of(client, config.name) if each.data.tags["raydit.stage"] == "train"]
    client.delete_run(deleted.info.run_id)
    finish(config, tracker, pipeline, run, restarted)
    new = {each.data.tags["raydit.stage"]: each for each in runs_of(client, config.name)}
    assert len(new) == 2 and new["train"].data.tags["raydit.replaces"] == deleted.info.run_id
    assert new["train"].data.tags["mlflow.parentRunId"] == new["pipeline"].info.run_id
    assert_complete(client, new["train"], [1, 2])
    (said,) = capsys.readouterr().out.splitlines()
    assert f"was deleted in MLflow; all of it is in a new one, {new['train'].info.run_id}" in said


def test_the_children_of_a_deleted_pipeline_are_those_of_the_new_one(recipe, client, picture):
    config, tracker, pipeline, run = start_delivered(recipe, picture)
    (deleted,) = [each for each in runs_of(client, config.name) if each.data.tags["raydit.stage"] == "pipeline"]
    client.delete_run(deleted.info.run_id)
    pipeline.end("FINISHED")
    run.end("FINISHED")
    close_delivered(tracker)
    new = {each.data.tags["raydit.stage"]: each for each in runs_of(client, config.name)}
    assert new["train"].data.tags["mlflow.parentRunId"] == new["pipeline"].info.run_id != deleted.info.run_id


@pytest.mark.parametrize("restarted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_deleted_experiment_leads_to_a_new_one_with_everything(recipe, client, picture, capsys, restarted):
    """Deleted in the middle, or between two commands."""
    config, tracker, pipeline, run = start_delivered(recipe, picture)
    client.delete_experiment(client.get_experiment_by_name(config.name).experiment_id)
    finish(config, tracker, pipeline, run, restarted)
    new = {each.data.tags["raydit.stage"]: each for each in runs_of(client, f"{config.name} (2)")}
    assert new["train"].data.tags["mlflow.parentRunId"] == new["pipeline"].info.run_id
    assert_complete(client, new["train"], [1, 2])
    (said,) = capsys.readouterr().out.splitlines()
    assert f"experiment '{config.name}' was deleted in MLflow; runs go to a new one, '{config.name} (2)'" in said

    tracker = Tracker.open(config)  # the next command goes on there, and says nothing any more
    tracker.start_run("encode", {}).end("FINISHED")
    close_delivered(tracker)
    assert len(runs_of(client, f"{config.name} (2)")) == 3 and capsys.readouterr().out == ""
    assert {run["stage"] for run in list_runs(config.tracking.uri, experiment=config.name)} == {
        "pipeline",
        "train",
        "encode",
    }


def test_a_run_that_a_killed_process_created_is_not_created_again(recipe, client, picture, capsys):
    """The process was killed before its journal noted anything: all entries are sent again."""
    config = recipe()
    tracker = Tracker.open(config)
    _, run = train_a_little(tracker, picture)
    run.end("FINISHED")
    close_delivered(tracker)
    tracker._journal.path.with_suffix(".state.json").unlink()
    close_delivered(Tracker.open(config))
    again = {each.data.tags["raydit.stage"]: each for each in runs_of(client, config.name)}
    assert len(runs_of(client, config.name)) == 2
    assert_complete(client, again["train"], [1])
    assert len(client.search_logged_models([again["train"].info.experiment_id])) == 1


@pytest.mark.parametrize("name", ["flowers-v1.2", "a/b", "it's 100%", 'say "a:b"'])
def test_names_that_mlflow_refuses_for_models_are_cleaned_and_scores_found(recipe, client, capsys, name, tmp_path):
    config = replace(recipe(), name=f"{tmp_path.name} {name}")
    tracker = Tracker.open(config)
    run = tracker.start_run("evaluate", {}, run_tags={"raydit.protocol_id": "p", "raydit.output": "/it's/" + name})
    run.model(DIGEST, name=f"{config.name}-step_6", step=6, params={}, tags={"raydit.checkpoint_digest": DIGEST})
    run.metrics({"eval/fid_50k": 12.5}, 6, model=DIGEST, dataset=("reference", DIGEST))
    run.end("FINISHED")
    close_delivered(tracker)
    (said,) = capsys.readouterr().out.splitlines()
    assert f"MLflow allows {config.name!r} as the experiment's name only" in said
    best = best_checkpoints(config.tracking.uri, config.name)
    assert [(each["value"], each["step"]) for each in best["checkpoints"]] == [(12.5, 6)]
    (model,) = client.search_logged_models([client.get_experiment_by_name(config.name).experiment_id])
    assert not set(model.name) & set("/:.%\"'") and model.name.endswith("-step_6")


def test_what_waits_is_delivered_by_a_command_and_by_the_next_stage(recipe, client, raydit, capsys, monkeypatch):
    def leave_something(stage):
        with monkeypatch.context() as away:
            away.setattr(MlflowClient, "create_run", unreachable)
            tracker = Tracker.open(config)
            tracker.start_run(stage, {}).end("FINISHED")
            tracker.close()
        capsys.readouterr()

    config = recipe()
    leave_something("train")
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "create_run", unreachable)
        code, out, _ = raydit("runs", "deliver", config.output)
        assert code == 1 and f"deliver      0 entries of {config.output} to {config.tracking.uri}, 2 still wait" in out
    code, out, _ = raydit("runs", "deliver", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["journals"][0]["delivered"] == 2
    assert [run.data.tags["raydit.stage"] for run in runs_of(client, config.name)] == ["train"]
    code, out, _ = raydit("runs", "deliver", config.output)
    assert code == 0 and "nothing waits" in out

    leave_something("encode")
    with StageContext(config) as context:  # of a command whose stages are all finished
        wait_until(lambda: not context.tracker._journal.undelivered)
    assert len(runs_of(client, config.name)) == 2


def test_an_output_that_cannot_be_delivered_does_not_keep_the_others_from_it(recipe, client, raydit, tmp_path):
    """Each has a journal with one entry; it is not known for which store the first one is."""
    for name, store in (("a", None), ("b", recipe().tracking.uri)):
        journal = tmp_path / name / ".tracking" / "0123456789ab.jsonl"
        journal.parent.mkdir(parents=True)
        journal.write_text("{}\n")
        if store:
            journal.with_suffix(".state.json").write_text(json.dumps({"offset": 0, "known": {}, "uri": store}))
    code, out, _ = raydit("runs", "deliver", "--json")
    first, *_, result = out.splitlines()
    assert code == 1 and "a cannot be delivered: " in first and "found no record of the store" in first
    assert [each["output"] for each in json.loads(result)["journals"]] == ["b"]
    assert [each["output"] for each in json.loads(result)["failed"]] == ["a"]
    code, _, err = raydit("runs", "deliver", "a")
    assert code == 2 and "found no record of the store" in err


def unreachable(*args, **kwargs):
    raise ConnectionRefusedError("down")
