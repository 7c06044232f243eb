"""A project that was moved or copied with its database: noticed before anything is written, and mended by a command."""

import json
import shutil
import sqlite3
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import close_delivered
from PIL import Image
from tiny import tiny_recipe
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.cli.doctor_checks import check_tracking_store
from pipelines.config.recipe import TrackingConfig
from pipelines.tracking import relocation
from pipelines.tracking.journal_folder import journal_path
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.tracking.lookup import find_checkpoint
from pipelines.tracking.moved_store import earlier_folders
from pipelines.tracking.tracker import Tracker
from raydit.errors import InvalidInput


class Project:
    """A folder with a database, artifacts, and an output with a checkpoint, of which one entry waits."""

    def __init__(self, folder):
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"

    @property
    def config(self):
        config = tiny_recipe(self.folder)
        return replace(config, tracking=TrackingConfig(uri=self.uri), output=str(self.folder / "output"))

    def fill(self, monkeypatch):
        config = tiny_output(self.folder)
        checkpoint = write_checkpoint(config, 2)
        Image.new("RGB", (4, 4)).save(self.folder / "output" / "grid.png")
        tracker = Tracker.open(self.config)
        run = tracker.start_run("train", {}, run_tags={"raydit.output": config.output})
        run.input(name="latents", digest="d", source=f"{self.folder}/output/latents", context="training")
        log_checkpoint(run, checkpoint)
        run.artifact(self.folder / "output" / "grid.png", "before")
        close_delivered(tracker)
        with monkeypatch.context() as away:
            away.setattr(MlflowClient, "log_artifact", unreachable)
            tracker = Tracker.open(self.config)
            tracker.start_run("train", {}).artifact(self.folder / "output" / "grid.png", "after")
            tracker.close()

    @property
    def run(self):
        client = MlflowClient(self.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        return run


class Forgetful(OrderedDict):
    def __setitem__(self, key, value): ...


def unreachable(*args, **kwargs):
    raise ConnectionRefusedError("down")


@pytest.fixture
def project(tmp_path, empty_database, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # MLflow remembers where a run's artifacts are, for as long as a process lives.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", Forgetful())
    monkeypatch.setattr("pipelines.tracking.tracker.CLOSE_SECONDS", 5)
    (tmp_path / "first").mkdir()
    shutil.copy(empty_database, tmp_path / "first" / "mlflow.db")
    project = Project(tmp_path / "first")
    project.fill(monkeypatch)
    return project


@pytest.mark.parametrize("name", ["a%20b", "C#x", "what?"])
def test_a_moved_database_is_noticed_in_folders_of_any_name(tmp_path, empty_database, name):
    (tmp_path / name).mkdir()
    file = shutil.copy(empty_database, tmp_path / name)
    with sqlite3.connect(file) as database:
        database.execute("UPDATE experiments SET artifact_location = '/moved/away/mlruns'")
    before = sorted(tmp_path.rglob("*"))
    assert earlier_folders(f"sqlite:///{file}") == ["/moved/away"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_database_that_cannot_be_read_is_left_to_whoever_asks_mlflow(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database")
    assert earlier_folders(f"sqlite:///{tmp_path}/mlflow.db") == []


def test_a_relocation_that_was_killed_is_finished_when_it_is_repeated(project, tmp_path, monkeypatch):
    """Also for the journal of an output in a bucket, which is in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(relocation, "hold_folder", lambda output, on_lost: nullcontext())
    bucket = "s3://bucket/output"
    kept = journal_path(bucket, project.uri)
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    new = Project(tmp_path / "second")
    shutil.copytree(project.folder, new.folder)
    merge, journals = relocation.merge_journals, []

    def merge_once(path, *arguments):
        journals.append(path)
        if len(journals) == 2:
            raise KeyboardInterrupt
        merge(path, *arguments)

    monkeypatch.setattr(relocation, "merge_journals", merge_once)
    with pytest.raises(KeyboardInterrupt):
        relocation.relocate(new.uri, [bucket])
    (done,) = relocation.relocate(new.uri, [bucket])
    assert done.journals == 1 and done.artifacts > 0 and earlier_folders(new.uri) == []
    assert journal_path(new.config.output, new.uri).exists() and journal_path(bucket, new.uri).exists()


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_project_that_was_moved_or_copied_is_noticed_and_mended_by_one_command(
    project, tmp_path, raydit, monkeypatch, how
):
    old, new = project.folder, Project(tmp_path / "second")
    (shutil.move if how == "moved" else shutil.copytree)(old, new.folder)
    before = sorted(old.rglob("*"))
    run_id = new.run.info.run_id

    with pytest.raises(InvalidInput, match=f"was moved or copied: .* recorded in {old}.*Run: raydit runs relocate"):
        find_checkpoint(new.uri, f"runs:/{run_id}")
    check = check_tracking_store(new.uri)
    assert not check.ok and check.do == "run: raydit runs relocate"

    monkeypatch.chdir(new.folder)
    code, out, err = raydit("runs", "relocate", "--json")
    assert code == 0, err
    (done,) = json.loads(out.splitlines()[-1])["relocated"]
    assert (done["old"], done["new"], done["journals"]) == (str(old), str(new.folder), 1)
    assert earlier_folders(new.uri) == [] and check_tracking_store(new.uri).ok
    assert "has not moved" in raydit("runs", "relocate")[1]

    checkpoint = find_checkpoint(new.uri, f"runs:/{run_id}")
    assert checkpoint.location == str(new.folder / "output" / "checkpoints" / "step_0000002")
    assert Path(checkpoint.location).is_dir()
    code, out, err = raydit("runs", "deliver", str(new.folder / "output"))
    assert code == 0, out + err
    tracker = Tracker.open(new.config)  # goes on with the run that it was, under the database's new URI
    run = tracker.start_run("train", {})
    run.image(new.folder / "output" / "grid.png", "samples", 2)
    run.end("FINISHED")
    close_delivered(tracker)
    client = MlflowClient(new.uri)
    assert new.run.info.run_id == run_id and new.run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run_id)} == {"before", "after", "images"}
    (read,) = new.run.inputs.dataset_inputs
    assert json.loads(read.dataset.source) == {"uri": f"{new.folder}/output/latents"}
    (model,) = client.search_logged_models([new.run.info.experiment_id])
    assert model.artifact_location.startswith(str(new.folder)) and new.run.info.artifact_uri.startswith(str(new.folder))
    assert sorted(old.rglob("*")) == before  # nothing was written to the old folder


def test_a_stage_mends_the_database_before_it_writes_and_says_so(project, tmp_path, capsys):
    old, new = project.folder, Project(tmp_path / "second")
    shutil.copytree(old, new.folder)
    before, run_id = sorted(old.rglob("*")), new.run.info.run_id
    capsys.readouterr()
    close_delivered(Tracker.open(new.config))  # delivers what waited, too
    (said,) = capsys.readouterr().out.splitlines()
    assert f"was moved or copied from {old}; its artifacts and outputs lead to {new.folder} now" in said
    assert {file.path for file in MlflowClient(new.uri).list_artifacts(run_id)} == {"before", "after"}
    assert sorted(old.rglob("*")) == before
    close_delivered(Tracker.open(new.config))
    assert capsys.readouterr().out == ""


def test_artifacts_that_lie_elsewhere_on_purpose_are_left_there(project, tmp_path):
    client = MlflowClient(project.uri)
    (tmp_path / "elsewhere").mkdir()
    client.create_experiment("on purpose", artifact_location=str(tmp_path / "elsewhere" / "mlruns"))
    (tmp_path / "link").symlink_to(project.folder)
    assert earlier_folders(project.uri) == earlier_folders(f"sqlite:///{tmp_path}/link/mlflow.db") == []


def test_outputs_that_stayed_where_they_were_are_found_there(project, tmp_path, raydit):
    new = Project(tmp_path / "second")
    new.folder.mkdir()
    for name in ("mlflow.db", "mlruns"):
        shutil.move(project.folder / name, new.folder / name)
    code, out, err = raydit("runs", "relocate", "--store", new.uri)
    assert code == 0 and "journals: 1" in out, out + err
    location = find_checkpoint(new.uri, f"runs:/{new.run.info.run_id}").location
    assert location == str(project.folder / "output" / "checkpoints" / "step_0000002")
    assert sqlite3.connect(new.folder / "mlflow.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_lines_that_are_not_json_are_moved_as_they_are_and_torn_ones_removed(tmp_path):
    """One is set aside when the journal is opened; the other is what a kill leaves."""
    journals = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    line = json.dumps({"op": "artifact", "run": "r", "path": "/old/x"}).encode()
    journals[0].write_bytes(line + b"\nnot JSON\n" + line[:9])
    journals[1].write_bytes(line + b"\n" + line[:9])
    move = relocation.Move("/old", "/new")
    relocation.merge_journals(*journals, "sqlite:////new/mlflow.db", lambda line: relocation._moved_line(move, line))
    assert not journals[0].exists()
    moved = line.replace(b"/old", b"/new")
    assert journals[1].read_bytes().splitlines() == [moved, b"not JSON", line]
