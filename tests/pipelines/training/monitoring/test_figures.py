"""Figures of a training: which numbers they are drawn from, and when."""

from pathlib import Path

import pytest
from fakes import FakeContext, FakeRun
from PIL import Image
from tiny import tiny_recipe

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.train import start_monitor
from pipelines.training.group.messages import Report
from pipelines.training.monitoring.figures import TrainFigures


class Run:
    """A run whose journal holds the metrics of an earlier command, by prefix and name."""

    def __init__(self, **points):
        self._points, self.files = points, []

    def points(self, prefix):
        return {name: dict(values) for name, values in self._points.get(prefix.rstrip("/"), {}).items()}

    def artifact(self, path, folder):
        with Image.open(path) as picture:
            self.files.append((folder, Path(path).name, picture.size))


def test_a_training_is_drawn_with_the_metrics_of_an_earlier_command(tmp_path):
    before = {"images_per_second": {10: 8.0}, "data_wait": {10: 0.5}, "loss_quartile_1": {10: 2.0}}
    run = Run(train=before)
    figures = TrainFigures(run, str(tmp_path), images_per_step=8)
    figures.add(30, {"images_per_second": 16.0, "data_wait": 0.1, "checkpoint_wait": 0.3, "loss_quartile_1": 1.0})
    # 10 steps of 8 images at 8 a second, then 20 at 16 a second.
    assert figures.seconds() == pytest.approx({"steps": 5 + 6, "data wait": 5 + 1, "checkpoints": 3})
    figures.save()
    assert [(folder, name) for folder, name, _ in run.files] == [
        ("figures", "loss_by_timestep.png"),
        ("figures", "throughput.png"),
        ("figures", "time.png"),
    ]


def test_the_loss_of_held_out_images_is_drawn_beside_the_trainings(tmp_path):
    train = {"images_per_second": {10: 8.0}, "loss": {10: 2.0}, "loss_quartile_1": {10: 2.0}}
    run = Run(train=train, validation={"loss": {10: 2.5}})
    figures = TrainFigures(run, str(tmp_path), images_per_step=8)
    figures.add_validation(20, {"loss": 2.25, "raw_loss": 3.0})
    assert figures.values("validation/loss") == {10: 2.5, 20: 2.25} and figures.values("loss") == {10: 2.0}
    figures.save()
    assert "validation_loss.png" in [name for _, name, _ in run.files]


def test_a_training_without_a_report_is_not_drawn(tmp_path):
    run = Run()
    TrainFigures(run, str(tmp_path), images_per_step=8).save()
    assert run.files == []


def test_steps_that_are_computed_again_are_logged_once_unless_their_images_are_others(tmp_path):
    """Workers that died go on from the checkpoint before; a rollback goes on with later batches."""

    class CountingRun(FakeRun):
        calls = 0

        def metrics(self, *arguments, **options):
            self.calls += 1
            super().metrics(*arguments, **options)

    def report(step, loss):
        shares = {f"{kind}_{quarter}": 0.25 for kind in ("sum", "count") for quarter in (1, 2, 3, 4)}
        return Report(step, {"loss": loss, "lr": 1e-3, "images_per_second": 8.0, **shares})

    run, checkpoints = CountingRun({"loss": {2: 0.6}}), CheckpointFolder(str(tmp_path / "none"))
    monitor = start_monitor(tiny_recipe(tmp_path), FakeContext(), run, checkpoints, 0)
    for step, loss in ((2, 0.6), (4, 0.5), (6, 0.4)):
        monitor.on_message(report(step, loss))
    assert run.values("train/loss") == {4: 0.5, 6: 0.4}  # an earlier command has logged step 2
    for step, loss in ((4, 0.5), (6, 0.4 + 1e-7)):
        monitor.on_message(report(step, loss))
    assert run.calls == 2
    monitor.on_message(report(6, 0.7))
    assert run.calls == 3 and run.values("train/loss")[6] == 0.7
