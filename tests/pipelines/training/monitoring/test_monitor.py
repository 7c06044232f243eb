"""What an interrupted driver of a training leaves to the next one: a run without its end, and grids to draw."""

import json
from pathlib import Path

import pytest
from fakes import FakeContext, FakeRun
from tiny_training import Training, training_recipe

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.dataset import LatentDataset
from pipelines.train import start_monitor, train
from pipelines.training.cursor import DataCursor
from pipelines.training.group.messages import Saved
from pipelines.training.monitoring.previews import Previews
from pipelines.training.starting.identity import training_artifact
from pipelines.training.starting.prepare_checkpoints import prepare_checkpoints
from raydit.errors import InvalidInput

RUN = {"step": 4, "run": FakeRun.key}


class Grids(Previews):
    """Grids that nobody draws, but those of the steps in `drawn`; the others are there once they are waited for."""

    started: list[int] = []
    drawn: set[int] = set()

    def start(self, checkpoint, step, digest):
        self.started.append(step)
        self._pending[step] = step, digest

    def collect(self, *, wait=False):
        kept = {} if wait else {step: pending for step, pending in self._pending.items() if step not in self.drawn}
        self._pending = kept


class Context(FakeContext):
    """A context on whose cluster there is room for evaluation, or is not."""

    def __init__(self, has_room=True):
        super().__init__()
        self.has_room = has_room

    def start_ray(self, workers, stage):
        if not self.has_room:
            raise InvalidInput("evaluate.gpus_per_worker: found 1", "what a node has", "set 0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose training has written its last checkpoint."""
    recipe = training_recipe(tmp_path_factory.mktemp("run"), steps=4, checkpoint_every=2, sample_every=2)
    prepare_checkpoints(training_artifact(recipe, LatentDataset.open(recipe.latents)), 4)
    return Training(recipe).run().recipe


@pytest.fixture(autouse=True)
def grids(monkeypatch):
    monkeypatch.setattr("pipelines.train.Previews", Grids)
    monkeypatch.setattr(Grids, "started", [])
    return Grids


@pytest.fixture
def cursor(recipe):
    """The file with the tracking cursor, as an earlier version of raydit wrote it."""
    file = Path(recipe.folder("checkpoints")) / "told.json"
    file.write_text(json.dumps(RUN))
    return file


def interrupt_while_waiting(recipe):
    """Follow the training in a driver that is interrupted while it waits for the last grids."""
    monitor = start_monitor(recipe, FakeContext(), FakeRun(), CheckpointFolder(recipe.folder("checkpoints")), 0)
    for step in (2, 4):
        monitor.on_message(Saved(step))


def assert_finished(recipe, capsys):
    """Assert that another command opens no run."""
    context = Context()
    context.last_run = None
    train(recipe, context=context)
    assert "already finished: 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("drawn", "missed"), [(set(), [2, 4]), ({2}, [4]), ({2, 4}, [])])
def test_the_next_command_ends_the_run_and_draws_what_was_not_drawn(
    recipe, cursor, grids, monkeypatch, capsys, drawn, missed
):
    monkeypatch.setattr(grids, "drawn", drawn)
    interrupt_while_waiting(recipe)
    assert json.loads(cursor.read_text()) == {**RUN, "finished": False, "samples": missed}
    grids.started.clear()
    assert train(recipe, context=Context()).step == 4
    assert grids.started == missed and json.loads(cursor.read_text()) == RUN
    assert_finished(recipe, capsys)


def test_grids_that_cannot_be_drawn_do_not_keep_a_training_from_its_end(recipe, cursor, capsys):
    interrupt_while_waiting(recipe)
    train(recipe, context=Context(has_room=False))
    assert "no samples of step 2, 4: evaluate.gpus_per_worker: found 1" in capsys.readouterr().out
    assert_finished(recipe, capsys)


def test_a_training_that_an_earlier_version_has_finished_stays_finished(recipe, cursor, capsys):
    assert_finished(recipe, capsys)
    assert json.loads(cursor.read_text()) == RUN


def test_a_training_that_is_cut_short_of_its_interruption_is_finished_by_one_more_command(recipe, cursor, capsys):
    cursor.write_text(json.dumps({**RUN, "step": 7}))
    train(recipe, context=Context())
    assert json.loads(cursor.read_text()) == RUN
    assert_finished(recipe, capsys)


def test_a_training_that_goes_on_draws_what_was_not_drawn_once_its_workers_report(recipe, cursor, grids):
    cursor.write_text(json.dumps({**RUN, "finished": False, "samples": [2, 3]}))  # the checkpoint of step 3 is gone
    checkpoints = CheckpointFolder(recipe.folder("checkpoints"))
    monitor = start_monitor(recipe, FakeContext(), FakeRun(), checkpoints, 4)
    assert grids.started == []
    for report in DataCursor.of(checkpoints.describe(4)).reports:
        monitor.on_message(report)
    assert grids.started == [2]


def test_grids_are_drawn_of_checkpoints_that_a_killed_driver_has_not_logged(recipe, cursor):
    cursor.unlink()
    monitor = start_monitor(recipe, FakeContext(), FakeRun(), CheckpointFolder(recipe.folder("checkpoints")), 0)
    assert monitor.missed_samples == {2, 4}
