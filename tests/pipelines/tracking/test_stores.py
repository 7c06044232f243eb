"""Stores that several write to, that go away and come back, and that stay light over long trainings."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer, close_delivered, free_port, wait_until

from pipelines.config.reader import load_recipe
from pipelines.tracking import experiments, mlflow_writer
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[3]
RUNS, POINTS = 3, 200
TELL = f"""
import sys
sys.path.insert(0, "tests")
from mlflow_server import close_delivered
from pipelines.config.reader import load_recipe
from pipelines.tracking.tracker import Tracker
output, uri = sys.argv[1:]
settings = ["name=shared", "output=" + output, "tracking.uri=" + uri]
tracker = Tracker.open(load_recipe("tests/recipes/tiny.toml", settings))
for number in range({RUNS}):
    run = tracker.start_run("train", {{"output": output, "number": number}})
    run.params({{"output": output}})
    for step in range({POINTS}):
        run.metrics({{"train/loss": float(step + number)}}, step)
    run.end("FINISHED")
close_delivered(tracker)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (0.2,))


def open_tracker(folder, uri, name="shared"):
    return Tracker.open(
        load_recipe(ROOT / "tests/recipes/tiny.toml", (f"name={name}", f"output={folder}", f"tracking.uri={uri}"))
    )


def tell_at_once(tmp_path, uri):
    """Two processes, each with runs of its own in one experiment."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", TELL, str(tmp_path / name), uri], cwd=ROOT, env=env)
        for name in ("first", "second")
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]


def assert_all_is_told(client):
    experiment = client.get_experiment_by_name("shared").experiment_id
    runs = client.search_runs([experiment])
    assert len(runs) == 2 * RUNS and {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.params["output"] for run in runs}) == 2
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(POINTS))
        assert len({point.value - point.step for point in history}) == 1


@pytest.mark.slow
def test_two_processes_make_one_database_and_write_to_it_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tell_at_once(tmp_path, uri)
    assert_all_is_told(MlflowClient(uri))


@pytest.mark.slow
def test_two_processes_write_to_one_server_at_once(tmp_path, store):
    with MlflowServer(store, free_port(), tmp_path) as server:
        tell_at_once(tmp_path, server.uri)
        assert_all_is_told(MlflowClient(server.uri))


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(tmp_path, store, monkeypatch, capsys):
    """As if it came up between the question and the making."""
    close_delivered(open_and_tell(tmp_path / "first", store))
    find, answers = experiments.find_experiment, iter([None])
    monkeypatch.setattr(mlflow_writer, "find_experiment", lambda client, name: next(answers, find(client, name)))
    close_delivered(open_and_tell(tmp_path / "second", store))
    assert "refused" not in capsys.readouterr().out
    client = MlflowClient(store)
    assert len(client.search_runs([client.get_experiment_by_name("raced").experiment_id])) == 2


def open_and_tell(folder, uri):
    tracker = open_tracker(folder, uri, name="raced")
    tracker.start_run("train", {"folder": str(folder)}).end("FINISHED")
    return tracker


@pytest.mark.slow
def test_a_server_that_stops_for_twenty_seconds_gets_everything_in_order(tmp_path, store, capsys):
    server = MlflowServer(store, free_port(), tmp_path)
    with server:
        server.wait()
        tracker = open_tracker(tmp_path, server.uri, name="outage")
        run = tracker.start_run("train", {})
        told = tell_steps(run, range(50))
        wait_until(lambda: not tracker._journal.undelivered)
    for step in range(50, 250):  # training goes on
        told += tell_steps(run, [step])
        time.sleep(0.1)
    assert tracker._journal.undelivered and capsys.readouterr().out.count("does not answer") == 1
    with server:
        told += tell_steps(run, range(250, 300))
        run.end("FINISHED")
        close_delivered(tracker)
        client = MlflowClient(server.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("outage").experiment_id])
        history = client.get_metric_history(run.info.run_id, "train/loss")
    assert run.info.status == "FINISHED"
    assert [(point.step, point.value) for point in history] == told


def tell_steps(run, steps):
    for step in steps:
        run.metrics({"train/loss": step / 7}, step)
    return [(step, step / 7) for step in steps]


def test_ten_thousand_steps_are_some_hundred_points_and_few_calls(tmp_path, store, monkeypatch):
    """At the default of train.log_every; of a store that was away, all at once."""
    calls, log_batch = [], MlflowClient.log_batch

    def counted(self, run_id, metrics=(), **others):
        calls.append(len(metrics))
        return log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    every = load_recipe(ROOT / "pipelines/recipes/digits.toml").train.log_every
    names = [f"train/{number}" for number in range(12)]
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "create_run", unreachable)
        tracker = open_tracker(tmp_path, store, name="long")
        run = tracker.start_run("train", {})
        for step in range(every, 10_001, every):
            run.metrics(dict.fromkeys(names, 0.5), step)
    close_delivered(tracker)
    assert sum(calls) == 12 * 10_000 // every and len(calls) <= 10
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("long").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, names[0])) == 10_000 // every <= 500


def unreachable(*args, **kwargs):
    raise ConnectionRefusedError("down")
