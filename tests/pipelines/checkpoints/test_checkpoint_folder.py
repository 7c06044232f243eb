"""Folders of checkpoints, on disk and in a bucket: a checkpoint is complete or absent, and on disk never copied."""

import os
from pathlib import Path

import pytest
import torch

from cluster import storage
from dit.checkpoint import save_checkpoint, verify_checkpoint
from dit.config import DiTConfig
from dit.formats.completion import COMPLETE, step_name
from dit.metrics_window import WindowTotals
from dit.model import DiT
from dit.schedule import TrainingConfig
from dit.train import create_state
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import open_checkpoint


@pytest.fixture(params=["disk", "bucket"])
def checkpoints(request, tmp_path):
    """A folder that does not exist yet."""
    if request.param == "bucket":
        return CheckpointFolder(f"{request.getfixturevalue('s3_bucket')}/output/checkpoints")
    return CheckpointFolder(str(tmp_path / "output" / "checkpoints"))


def saver(step, seed=0, interrupted=False):
    """Return a function that saves a small state into a folder."""
    torch.manual_seed(seed)
    network = DiT(DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2))
    state = create_state(network, TrainingConfig(steps=9, global_batch_size=4))
    state.step = step
    if interrupted:
        state.open_window = WindowTotals(sums={}, tensors=[], steps=0, seconds=0.0, waited=0.0, saved=0.0)
    return lambda folder: save_checkpoint(state, folder, {"class_names": ["a", "b"]}, {"seed": seed})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_found_and_opened_by_its_step(checkpoints):
    assert checkpoints.finished_steps() == [] and checkpoints.newest() is None
    for step in (20, 3, 100):
        checkpoints.write(step, saver(step, seed=step))
    assert checkpoints.finished_steps() == [3, 20, 100]
    newest = checkpoints.newest()
    assert newest.step == 100 and newest.origin == storage.join(checkpoints.uri, "step_0000100")
    verify_checkpoint(newest)
    assert torch.equal(
        newest.weights("model")["final_layer.linear.weight"],
        checkpoints.open(100).weights("model")["final_layer.linear.weight"],
    )
    assert open_checkpoint(storage.join(checkpoints.uri, "step_0000003")).step == 3


def test_publishing_moves_a_local_folder(checkpoints, tmp_path):
    saver(5)(tmp_path / "elsewhere")
    expected = content(tmp_path / "elsewhere")
    checkpoints.publish(str(tmp_path / "elsewhere"), 5)
    assert not (tmp_path / "elsewhere").exists()
    assert content(checkpoints.newest().path) == expected


def test_an_incomplete_checkpoint_does_not_count_and_is_replaced(checkpoints, tmp_path):
    checkpoints.write(1, saver(1))
    for name in ("model.safetensors", "of_another_try.safetensors"):
        storage.write_atomically(storage.join(checkpoints.uri_of(2), name), b"half")
    assert checkpoints.finished_steps() == [1] and checkpoints.newest().step == 1
    with pytest.raises(FileNotFoundError, match="step_0000002.*COMPLETE"):
        checkpoints.open(2)
    saver(2)(tmp_path / "complete")
    checkpoints.publish(str(tmp_path / "complete"), 2)
    newest = checkpoints.newest()
    assert newest.step == 2 and "of_another_try.safetensors" not in content(newest.path)


def test_a_complete_checkpoint_is_not_replaced(checkpoints, tmp_path):
    checkpoints.write(4, saver(4, seed=0))
    digest = checkpoints.newest().digest
    checkpoints.write(4, saver(4, seed=1))
    saver(4, seed=1)(tmp_path / "other")
    checkpoints.publish(str(tmp_path / "other"), 4)
    assert checkpoints.newest().digest == digest and not (tmp_path / "other").exists()


def test_an_interrupted_checkpoint_is_replaced_by_a_regular_one_of_its_step(checkpoints):
    checkpoints.write(4, saver(4, interrupted=True))
    assert checkpoints.interrupted_steps() == [4]
    checkpoints.write(4, saver(4))
    assert (checkpoints.finished_steps(), checkpoints.interrupted_steps()) == ([4], [])
    verify_checkpoint(checkpoints.newest())


def test_checkpoints_that_are_set_aside_are_kept_beside_superseded_trainings(checkpoints):
    folders = []
    for seed in (0, 1):
        checkpoints.write(4, saver(4, seed, interrupted=True))
        # Not fetched: two writes within a second look alike in a bucket, whose times have a resolution of one second.
        digest = checkpoints.describe(4).digest
        folders.append(storage.split(checkpoints.set_aside(4))[0])
        kept = CheckpointFolder(folders[-1])
        assert kept.newest().digest == digest and kept.interrupted_steps() == [4] and not checkpoints.has_any()
        verify_checkpoint(kept.newest())
    output = storage.split(checkpoints.uri)[0]
    assert folders == [storage.join(output, "superseded", f"checkpoints-{number}") for number in (1, 2)]


def test_removing_is_repeatable(checkpoints):
    for step in (1, 2):
        checkpoints.write(step, saver(step))
    for _ in range(2):
        checkpoints.remove(2)
    assert checkpoints.finished_steps() == [1]
    assert not storage.exists(checkpoints.uri_of(2))


def test_an_interrupted_removal_leaves_no_checkpoint_that_counts(checkpoints, monkeypatch):
    def cut(path):
        raise KeyboardInterrupt

    checkpoints.write(1, saver(1))
    monkeypatch.setattr(storage, "remove_folder", cut)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(1)
    assert checkpoints.finished_steps() == []


def test_publishing_on_disk_copies_nothing(tmp_path):
    location = tmp_path / "checkpoints"
    saver(1)(tmp_path / "elsewhere")
    inode = os.stat(tmp_path / "elsewhere" / "model.safetensors").st_ino
    checkpoints = CheckpointFolder(str(location))
    checkpoints.publish(str(tmp_path / "elsewhere"), 1)
    opened = checkpoints.newest()
    assert opened.path == location / step_name(1) and opened.origin == str(opened.path)
    assert os.stat(opened.path / "model.safetensors").st_ino == inode
    assert CheckpointFolder(location.as_uri()).newest().path == opened.path


def test_a_checkpoint_in_a_bucket_is_fetched_once(s3_bucket, s3_app):
    checkpoints = CheckpointFolder(s3_bucket)
    checkpoints.write(1, saver(1))
    first = checkpoints.newest()
    before = s3_app.count
    again = checkpoints.newest()
    assert again.path == first.path and s3_app.count - before < 8
    (entry,) = Path(storage.cache_folder("beside")).iterdir()
    assert list(entry.iterdir()) == []  # no local copy is kept after the upload


def test_what_only_resuming_needs_is_not_fetched_to_sample_from_a_checkpoint(s3_bucket, s3_app):
    checkpoints = CheckpointFolder(s3_bucket)
    checkpoints.write(1, saver(1))
    for opened in (checkpoints.open(1), open_checkpoint(checkpoints.uri_of(1))):
        assert not (opened.path / "trainer").exists() and opened.path.name != step_name(1)
        verify_checkpoint(opened)
        assert opened.trainer_state["seed"] == 0 and (opened.weights_files(), opened.step) == (("ema.safetensors",), 1)
    newest = checkpoints.newest()
    verify_checkpoint(newest)
    assert (newest.path / "trainer" / "optimizer.safetensors").is_file()
    assert (newest.path != opened.path, newest.digest) == (True, opened.digest)
    before = s3_app.count
    assert checkpoints.open(1).path == newest.path and s3_app.count - before < 8  # a copy of all is used


def test_a_local_folder_left_by_a_killed_process_is_not_uploaded(s3_bucket):
    left = Path(storage.local_folder_for(s3_bucket)) / step_name(1)
    saver(1, seed=0)(left)
    CheckpointFolder(s3_bucket).write(1, saver(1, seed=1))
    saver(1, seed=1)(left.with_name("expected"))
    expected = (left.with_name("expected") / COMPLETE).read_bytes()
    assert (CheckpointFolder(s3_bucket).newest().path / COMPLETE).read_bytes() == expected


def test_describing_a_checkpoint_fetches_no_weights(checkpoints, tmp_path):
    checkpoints.write(7, saver(7))
    described = checkpoints.describe(7)
    assert not (tmp_path / "cache" / "raydit" / "fetched").exists()
    opened = checkpoints.newest()
    assert (described.config, described.digest, described.origin) == (opened.config, opened.digest, opened.origin)


def test_opening_the_folder_itself_names_the_checkpoints_in_it(checkpoints):
    checkpoints.write(7, saver(7))
    with pytest.raises(FileNotFoundError, match=r"step_0000007"):
        open_checkpoint(checkpoints.uri)
