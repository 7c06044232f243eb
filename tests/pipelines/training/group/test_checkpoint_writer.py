"""Checkpoints that cannot be written: tried again while training goes on, then the end of the training."""

from types import SimpleNamespace

import pytest
import torch
from tiny_training import Training, training_recipe

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.training.group.messages import Notice, Saved
from pipelines.training.group.stop import StopExchange
from pipelines.training.group.worker import CheckpointWriter, Worker


class Writing:
    """A writer of one worker, whose store fails for some steps. failures: how often, by step."""

    def __init__(self, monkeypatch, failures, pauses, stop=False):
        self.failures, self.written, self.messages = dict(failures), [], []
        monkeypatch.setattr("pipelines.training.group.worker.RETRY_SECONDS", pauses)
        monkeypatch.setattr(
            "dit.snapshot.take_snapshot", lambda state, keep: SimpleNamespace(step=state.step, interrupted=False)
        )
        self.worker = Worker(0, 1, torch.device("cpu"), self.messages.append, lambda: stop)
        self.writer = CheckpointWriter(self.worker, self.write)

    def write(self, snapshot, windows):
        if self.failures.get(snapshot.step):
            self.failures[snapshot.step] -= 1
            raise OSError(f"no answer at step {snapshot.step}")
        self.written.append(snapshot.step)

    def save(self, step):
        self.writer.save(SimpleNamespace(step=step, open_window=None))

    @property
    def notices(self):
        return [message.text for message in self.messages if isinstance(message, Notice)]


def test_a_checkpoint_is_written_once_its_store_answers(monkeypatch):
    writing = Writing(monkeypatch, {5: 2}, pauses=(0.01, 0.0))
    writing.save(5)
    writing.writer.wait()
    assert writing.written == [5] and Saved(5) in writing.messages
    first = "could not write the checkpoint of step 5 (no answer at step 5); trying again in 0.01 s"
    assert writing.notices == [first, first.replace("0.01", "0")]


def test_a_newer_checkpoint_is_written_though_an_earlier_one_could_not_be(monkeypatch):
    writing = Writing(monkeypatch, {5: 9}, pauses=(60.0, 60.0))
    writing.save(5)
    writing.save(9)  # does not wait for a minute
    writing.writer.wait()
    assert writing.written == [9] and Saved(5) not in writing.messages
    assert writing.notices[-1] == "a checkpoint before step 9 is missing: no answer at step 5"


@pytest.mark.parametrize("stop", [False, True])
def test_training_ends_soon_after_a_checkpoint_is_given_up(monkeypatch, stop):
    """Unless it is stopped, which writes another checkpoint."""
    writing = Writing(monkeypatch, {5: 9}, pauses=(), stop=stop)
    exchange = StopExchange(writing.worker, writing.writer)
    assert exchange() == stop
    writing.save(5)
    with pytest.raises(OSError, match="no answer at step 5"):
        writing.writer.wait()
    monkeypatch.setattr(exchange, "_exchange_after", 1)
    if stop:
        assert exchange()
    else:
        with pytest.raises(OSError, match="no answer at step 5"):
            exchange()


def test_a_checkpoint_that_is_tried_again_has_the_reports_of_its_steps(tmp_path, monkeypatch):
    write, failed = CheckpointFolder.write, []

    def fail_once(checkpoints, step, save):
        if not failed:
            save(tmp_path / "partial")
            failed.append(step)
            raise OSError("no answer")
        write(checkpoints, step, save)

    monkeypatch.setattr(CheckpointFolder, "write", fail_once)
    monkeypatch.setattr("pipelines.training.group.worker.RETRY_SECONDS", (0.0,))
    run = Training(training_recipe(tmp_path, steps=3)).run()
    assert failed == run.saved == [3]
    newest = CheckpointFolder(run.recipe.folder("checkpoints")).newest()
    assert [report["step"] for report in newest.trainer_state["reports"]] == [1, 2, 3]
