"""Emptying superseded/: what a registered model stands on stays."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.artifacts import Artifact
from pipelines.registry.cleaning import SupersededFolder, inspect_superseded
from pipelines.tracking.journal_folder import journal_path


@pytest.fixture
def output(story, tmp_path):
    """An output whose artifacts were all superseded twice, but for a checkpoint of step 6 and an autoencoder."""
    made, superseded = Path(story.config.output), tmp_path / "output" / "superseded"
    for number, step in (("1", 2), ("2", 4)):
        shutil.copytree(story.checkpoints[step].path, superseded / f"checkpoints-{number}" / f"step_{step:07d}")
        shutil.copytree(made / "latents", superseded / f"latents-{number}")
    shutil.copytree(made / "autoencoder", superseded / "autoencoder-1")
    other = shutil.copytree(made / "autoencoder", superseded / "autoencoder-2")
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"of no checkpoint")
    shutil.copytree(story.checkpoints[6].path, tmp_path / "output" / "checkpoints" / "step_0000006")
    return tmp_path / "output"


def test_superseded_folders_are_removed_but_for_what_a_registered_model_needs(raydit, story, output):
    client, name = MlflowClient(story.uri), "kept by clean"
    client.create_registered_model(name)
    client.create_model_version(name, str(output), tags={"raydit.digest": story.checkpoints[4].digest})
    try:
        folders = {Path(each.path).name: each for each in inspect_superseded(str(output), story.uri)}
        kept = {name for name, each in folders.items() if each.kept_for}
        assert kept == {"checkpoints-2", "autoencoder-1"}
        assert folders["checkpoints-2"].kept_for == "a registered model is its step 4"
        size = sum(file.stat().st_size for file in (output / "superseded" / "latents-1").rglob("*") if file.is_file())
        assert folders["latents-1"].num_bytes == size > 0
        before = sorted(output.rglob("*"))
        code, out, _ = raydit("clean", str(output), "--dry-run")  # the checkpoints name the store
        assert (
            code == 0 and "4 of 6 folders" in out and "would be removed" in out and sorted(output.rglob("*")) == before
        )
        code, _, err = raydit("clean", str(output))
        assert code == 2 and "confirm with --yes" in err and sorted(output.rglob("*")) == before
        code, out, _ = raydit("clean", str(output), "--yes", "--json")
        assert code == 0 and len(json.loads(out.splitlines()[-1])["removed"]) == 4
        assert {path.name for path in (output / "superseded").iterdir()} == kept
        assert (output / "checkpoints" / "step_0000006" / "COMPLETE").exists()
        assert "nothing to remove" in raydit("clean", str(output), "--yes")[1]
    finally:
        client.delete_registered_model(name)


def test_what_is_said_to_be_removed_is_what_was_removed(raydit, tmp_path, monkeypatch):
    """Between the two inspections a model was registered, and another folder has grown."""
    folders = [tmp_path / "superseded" / name for name in ("latents-1", "checkpoints-1")]
    for folder in folders:
        folder.mkdir(parents=True)
    before = [SupersededFolder(str(folder), 2**20, "") for folder in folders]
    after = [replace(before[0], num_bytes=3 * 2**20), replace(before[1], kept_for="a registered model is its step 4")]
    inspections = iter([before, after])
    monkeypatch.setattr("pipelines.registry.cleaning.inspect_superseded", lambda output, store: next(inspections))
    code, out, _ = raydit("clean", str(tmp_path), "--yes", "--json")
    assert code == 0 and "removed 1 of 2 folders, 3.0 MiB" in out
    found = json.loads(out.splitlines()[-1])
    assert found == {"removed": [str(folders[0])], "kept": [str(folders[1])], "bytes": 3 * 2**20}
    assert [folder.exists() for folder in folders] == [False, True]


def test_nothing_is_removed_while_a_store_does_not_answer(raydit, output):
    code, _, err = raydit("clean", str(output), "--yes", "--store", "http://127.0.0.1:9")
    assert code == 1 and "does not answer" in err and len(list((output / "superseded").iterdir())) == 6


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder; the recipes of the checkpoints left tracking.uri out."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.registry.cleaning._recorded_uri", lambda config: "")


def write_journal(output, uri):
    """Leave the journal of a command that has sent everything to a store."""
    path = journal_path(str(output), uri)
    path.parent.mkdir()
    path.touch()
    path.with_suffix(".state.json").write_text(json.dumps({"offset": 0, "known": {}, "uri": uri}))


def test_in_another_folder_the_store_is_that_of_the_journals(raydit, story, output, elsewhere):
    client, name = MlflowClient(story.uri), "kept by journal"
    client.create_registered_model(name)
    client.create_model_version(name, str(output), tags={"raydit.digest": story.checkpoints[4].digest})
    write_journal(output, story.uri)
    try:
        kept = {Path(each.path).name for each in inspect_superseded(str(output)) if each.kept_for}
        assert kept == {"checkpoints-2", "autoencoder-1"}
    finally:
        client.delete_registered_model(name)


def test_nothing_is_removed_if_a_store_does_not_exist(raydit, story, output, elsewhere, tmp_path):
    code, _, err = raydit("clean", str(output), "--yes")
    assert code == 2 and f"found no MLflow store at sqlite:///{tmp_path}/empty/mlflow.db" in err and "--store" in err
    write_journal(output, f"sqlite:///{tmp_path}/gone/mlflow.db")
    code, _, err = raydit("clean", str(output), "--yes")
    assert code == 2 and f"found no MLflow store at sqlite:///{tmp_path}/gone/mlflow.db" in err
    assert len(list((output / "superseded").iterdir())) == 6
    code, out, _ = raydit("clean", str(output), "--dry-run", "--store", story.uri)  # the user knows where they went
    assert code == 0 and "would be removed" in out


@pytest.mark.parametrize("name", ["typo", "recipe.toml"])
def test_a_mistyped_folder_is_not_taken_for_an_empty_one(raydit, tmp_path, name):
    (tmp_path / "recipe.toml").touch()
    code, _, err = raydit("clean", str(tmp_path / name))
    assert code == 2 and f"found no folder at {tmp_path / name}, expected the `output` of a recipe" in err


def test_an_interrupted_clean_leaves_nothing_that_could_be_taken_back(raydit, tmp_path, monkeypatch):
    artifact = Artifact("encode", str(tmp_path / "latents"), {"seed": 0})
    superseded = replace(artifact, folder=str(tmp_path / "superseded" / "latents-1"))
    superseded.prepare()
    (tmp_path / "superseded" / "latents-1" / "manifest.json").touch()

    def stop(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cluster.storage.remove_folder", stop)
        assert raydit("clean", str(tmp_path), "--yes")[0] == 130
    assert artifact.find_superseded() is None
    artifact.prepare()
    replace(artifact, identity={"seed": 1}).prepare()  # the part that is left is in nobody's way
    assert artifact.find_superseded() == str(tmp_path / "superseded" / "latents-2")
