"""The checkpoints of a running training are evaluated as they appear: every n-th one, and the last."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, copy_files
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster import storage
from cluster.storage.lease import hold_folder
from dit.formats.completion import write_completion
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.follow import follow_checkpoints
from pipelines.evaluate import EvaluationOptions, evaluate_each
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from pipelines.stage import StageContext
from raydit.errors import InUse, NotFound

HOLD = """
import sys, time
from cluster.storage.lease import hold_folder
with hold_folder(sys.argv[1], on_lost=print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(folder, seconds=60):
    """Hold a folder in another process."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "-c", HOLD, folder, str(seconds)]
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder with the checkpoints of a training of ten steps, one for every second step."""
    config = tiny_output(tmp_path_factory.mktemp("trained"), "train.steps=10", "train.checkpoint_every=2")
    for step in range(2, 12, 2):
        write_checkpoint(config, step)
    return Path(config.folder("checkpoints"))


class Training:
    """A `sleep` that copies the next finished checkpoint into a folder whenever it is called."""

    def __init__(self, source, target):
        self.waiting, self.target = sorted(source.glob("step_*")), target

    def __call__(self, seconds):
        assert self.waiting, "the watcher waits after the last step"
        shutil.copytree(self.waiting[0], self.target / self.waiting.pop(0).name)


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 4, 6, 8, 10]), (2, [4, 8, 10]), (7, [10])])
def test_every_nth_checkpoint_and_the_last_are_scored_as_they_appear(trained, tmp_path, every, expected):
    folder = tmp_path / "checkpoints"  # is not there yet
    found = follow_checkpoints(str(folder), every, checkpoint_recipe, sleep=Training(trained, folder))
    assert [(opened.step, config.train.steps) for opened, config in found] == [(step, 10) for step in expected]


def test_a_late_or_restarted_watcher_chooses_the_same_checkpoints(trained):
    found = follow_checkpoints(str(trained), 2, checkpoint_recipe, sleep=lambda _: pytest.fail("all is there"))
    assert [opened.step for opened, _ in found] == [4, 8, 10]


def test_weights_are_fetched_only_of_those_that_are_scored(trained, monkeypatch):
    opened, open_step = [], CheckpointFolder.open
    monkeypatch.setattr(CheckpointFolder, "describe", open_step)  # of a bucket, it fetches no weights
    monkeypatch.setattr(CheckpointFolder, "open", lambda folder, step: opened.append(step) or open_step(folder, step))
    assert [found.step for found, _ in follow_checkpoints(str(trained), 4, checkpoint_recipe)] == opened == [8, 10]


def extend(folder, step, steps):
    """Write the checkpoint of a later step, of a training that was extended to more steps."""
    target = folder / f"step_{step:07d}"
    shutil.copytree(folder / "step_0000010", target)
    record = json.loads((target / "config.json").read_text())
    train = record["recipe"]["train"] | {"steps": steps}
    write_completion(target, {**record, "step": step, "recipe": record["recipe"] | {"train": train}})


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 4, 6, 8, 10, 12, 14]), (4, [8, 14])])
def test_a_training_that_was_extended_is_followed_to_its_new_end(trained, tmp_path, every, expected):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    extend(folder, 12, 14)
    found = follow_checkpoints(str(folder), every, checkpoint_recipe, sleep=lambda _: extend(folder, 14, 14))
    assert [opened.step for opened, _ in found] == expected


def test_a_training_that_is_extended_while_its_last_checkpoint_is_scored_is_followed_further(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    found = []
    for opened, _ in follow_checkpoints(str(folder), 1, checkpoint_recipe, sleep=lambda _: None):
        found.append(opened.step)
        if opened.step == 10:
            extend(folder, 12, 12)
    assert found == [2, 4, 6, 8, 10, 12]


def test_a_checkpoint_that_is_removed_unread_does_not_end_the_watch(trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    targets = [(opened, checkpoint_recipe(opened)) for opened in map(CheckpointFolder(str(folder)).open, (2, 4))]

    def load(opened, *arguments, **options):
        raise NotFound(f"no checkpoint at {opened.path}", "one", "check the path")

    monkeypatch.setattr("pipelines.evaluate.plan_seeds", load)
    shutil.rmtree(targets[0][0].path)
    watching = EvaluationOptions(skip_removed=True)
    assert evaluate_each([targets[:1]], watching) == []
    assert "step 2 was removed before it was scored" in capsys.readouterr().out
    with pytest.raises(NotFound):  # this one is still there
        evaluate_each([targets[1:]], watching)
    with pytest.raises(NotFound, match=r"step_0000002 was removed while .*keep_last removes older ones"):
        evaluate_each([targets], EvaluationOptions())  # it was asked for by name
    with pytest.raises(NotFound, match="no checkpoint at"):
        evaluate_each([targets[1:]], EvaluationOptions())


def test_a_folder_that_does_not_exist_yet_is_named(trained, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    next(follow_checkpoints(str(folder), 1, checkpoint_recipe, sleep=Training(trained, folder)))
    assert f"watching {folder}, which does not exist yet; press" in capsys.readouterr().out
    next(follow_checkpoints(str(folder), 1, checkpoint_recipe))
    assert f"watching {folder}; press" in capsys.readouterr().out


def test_an_unfinished_checkpoint_is_ignored(trained, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "step_0000002", folder / "step_0000002")
    shutil.copytree(trained / "step_0000004", folder / "step_0000004")
    (folder / "step_0000004" / "COMPLETE").unlink()
    (folder / ".tmp-step_0000006").mkdir()
    assert CheckpointFolder(str(folder)).finished_steps() == [2]


def test_a_bucket_is_watched_like_a_folder(trained, s3_bucket):
    filesystem, inner = storage.resolve(s3_bucket)
    copy_files(str(trained), f"{inner}/out/checkpoints", LocalFileSystem(), filesystem)
    assert CheckpointFolder(f"{s3_bucket}/none").finished_steps() == []
    found = list(follow_checkpoints(f"{s3_bucket}/out/checkpoints", 3, checkpoint_recipe))
    assert [opened.origin for opened, _ in found] == [
        f"{s3_bucket}/out/checkpoints/step_0000006",
        f"{s3_bucket}/out/checkpoints/step_0000010",
    ]


def test_an_imported_checkpoint_cannot_be_watched(trained, tmp_path):
    folder = tmp_path / "checkpoints" / "step_0000002"
    shutil.copytree(trained / "step_0000002", folder)
    write_completion(folder, {**json.loads((folder / "config.json").read_text()), "recipe": None})
    with pytest.raises(ValueError, match="is imported and records no recipe.*Evaluate it without --watch"):
        next(follow_checkpoints(str(folder.parent), 1, checkpoint_recipe))


@pytest.mark.slow
def test_an_output_in_training_can_be_evaluated_by_one_process_at_a_time(trained):
    """Other processes hold the folders, because one process may hold a folder several times."""
    config = checkpoint_recipe(next(follow_checkpoints(str(trained), 7, checkpoint_recipe))[0])
    with held(config.output):
        with pytest.raises(InUse):
            StageContext(config).__enter__()
        with StageContext(config, part="evaluations") as context:
            assert context.tracker is not None
            assert (Path(config.output) / "evaluations" / ".lease.json").is_file()
    with held(storage.join(config.output, "evaluations")):
        with pytest.raises(InUse, match="evaluations is in use by"):
            StageContext(config, part="evaluations").__enter__()
        with hold_folder(config.output, on_lost=print):  # a training may begin
            pass


@pytest.mark.slow
def test_a_run_waits_for_an_evaluation_in_its_output(trained, capsys):
    config = checkpoint_recipe(next(follow_checkpoints(str(trained), 7, checkpoint_recipe))[0])
    with held(storage.join(config.output, "evaluations"), seconds=4), StageContext(config) as context:
        with context.holding("evaluations"):
            assert "waiting, because" in capsys.readouterr().out
