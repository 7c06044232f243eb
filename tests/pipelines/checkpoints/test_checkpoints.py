"""Checkpoints by step, on disk and in a bucket: whole or not there, and on disk never copied."""

import os
from pathlib import Path

import pytest
import torch

from cluster import storage
from dit.checkpoint import COMPLETE, save_checkpoint, step_name, verify_checkpoint
from dit.config import DiTConfig
from dit.model import DiT
from dit.schedule import TrainingConfig
from dit.train import create_state
from pipelines.checkpoints import stored as checkpoints


@pytest.fixture(params=["disk", "bucket"])
def location(request, tmp_path):
    if request.param == "bucket":
        return f"{request.getfixturevalue('s3_bucket')}/output/checkpoints"
    return str(tmp_path / "output" / "checkpoints")


def saver(step, seed=0):
    """A function that saves a small state into a folder."""
    torch.manual_seed(seed)
    network = DiT(DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2))
    state = create_state(network, TrainingConfig(steps=9, global_batch_size=4))
    state.step = step
    return lambda folder: save_checkpoint(state, folder, {"class_names": ["a", "b"]}, {"seed": seed})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_found_and_opened_by_its_step(location):
    assert checkpoints.finished_steps(location) == [] and checkpoints.newest(location) is None
    for step in (20, 3, 100):
        checkpoints.write(location, step, saver(step, seed=step))
    assert checkpoints.finished_steps(location) == [3, 20, 100]
    newest = checkpoints.newest(location)
    assert newest.step == 100 and newest.location == storage.join(location, "step_0000100")
    verify_checkpoint(newest)
    assert torch.equal(
        newest.weights("model")["final_layer.linear.weight"],
        checkpoints.open_checkpoint(checkpoints.checkpoint_location(location, 100)).weights("model")[
            "final_layer.linear.weight"
        ],
    )
    assert checkpoints.open_checkpoint(storage.join(location, "step_0000003")).step == 3


def test_a_published_folder_is_the_checkpoint_and_gone_from_where_it_was(location, tmp_path):
    saver(5)(tmp_path / "elsewhere")
    expected = content(tmp_path / "elsewhere")
    checkpoints.publish(str(tmp_path / "elsewhere"), location, 5)
    assert not (tmp_path / "elsewhere").exists()
    assert content(checkpoints.newest(location).path) == expected


def test_a_folder_without_complete_does_not_count_and_is_replaced(location, tmp_path):
    checkpoints.write(location, 1, saver(1))
    for name in ("model.safetensors", "of_another_try.safetensors"):
        storage.write_atomically(storage.join(location, step_name(2), name), b"half")
    assert checkpoints.finished_steps(location) == [1] and checkpoints.newest(location).step == 1
    with pytest.raises(FileNotFoundError, match="step_0000002.*COMPLETE"):
        checkpoints.open_checkpoint(storage.join(location, step_name(2)))
    saver(2)(tmp_path / "whole")
    checkpoints.publish(str(tmp_path / "whole"), location, 2)
    newest = checkpoints.newest(location)
    assert newest.step == 2 and "of_another_try.safetensors" not in content(newest.path)


def test_a_complete_one_is_kept(location, tmp_path):
    checkpoints.write(location, 4, saver(4, seed=0))
    digest = checkpoints.newest(location).digest
    checkpoints.write(location, 4, saver(4, seed=1))
    saver(4, seed=1)(tmp_path / "other")
    checkpoints.publish(str(tmp_path / "other"), location, 4)
    assert checkpoints.newest(location).digest == digest and not (tmp_path / "other").exists()


def test_a_removed_one_is_gone_whether_or_not_it_was_there(location):
    for step in (1, 2):
        checkpoints.write(location, step, saver(step))
    for _ in range(2):
        checkpoints.remove(location, 2)
    assert checkpoints.finished_steps(location) == [1]
    assert not storage.exists(checkpoints.checkpoint_location(location, 2))


def test_a_removal_that_is_cut_off_leaves_nothing_that_counts(location, monkeypatch):
    def cut(path):
        raise KeyboardInterrupt

    checkpoints.write(location, 1, saver(1))
    monkeypatch.setattr(storage, "remove_folder", cut)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(location, 1)
    assert checkpoints.finished_steps(location) == []


def test_on_disk_nothing_is_copied(tmp_path):
    location = tmp_path / "checkpoints"
    saver(1)(tmp_path / "elsewhere")
    inode = os.stat(tmp_path / "elsewhere" / "model.safetensors").st_ino
    checkpoints.publish(str(tmp_path / "elsewhere"), str(location), 1)
    opened = checkpoints.newest(str(location))
    assert opened.path == location / step_name(1) and opened.location == str(opened.path)
    assert os.stat(opened.path / "model.safetensors").st_ino == inode
    assert checkpoints.newest(location.as_uri()).path == opened.path


def test_from_a_bucket_it_is_fetched_once(s3_bucket, s3_app):
    checkpoints.write(s3_bucket, 1, saver(1))
    first = checkpoints.newest(s3_bucket)
    before = s3_app.count
    again = checkpoints.newest(s3_bucket)
    assert again.path == first.path and s3_app.count - before < 8
    (entry,) = Path(storage.cache_folder("beside")).iterdir()
    assert list(entry.iterdir()) == []  # what was uploaded is not kept twice


def test_what_a_killed_process_left_to_upload_is_not_taken_for_the_new_one(s3_bucket):
    left = Path(storage.local_folder_for(s3_bucket)) / step_name(1)
    saver(1, seed=0)(left)
    checkpoints.write(s3_bucket, 1, saver(1, seed=1))
    saver(1, seed=1)(left.with_name("expected"))
    expected = (left.with_name("expected") / COMPLETE).read_bytes()
    assert (checkpoints.newest(s3_bucket).path / COMPLETE).read_bytes() == expected


def test_a_checkpoint_describes_itself_without_its_weights(location, tmp_path):
    checkpoints.write(location, 7, saver(7))
    described = checkpoints.describe_step(location, 7)
    assert not (tmp_path / "cache" / "raydit" / "fetched").exists()
    opened = checkpoints.newest(location)
    assert (described.config, described.digest, described.location) == (opened.config, opened.digest, opened.location)


def test_a_folder_of_checkpoints_names_those_in_it(location):
    checkpoints.write(location, 7, saver(7))
    with pytest.raises(FileNotFoundError, match=r"step_0000007"):
        checkpoints.open_checkpoint(location)
