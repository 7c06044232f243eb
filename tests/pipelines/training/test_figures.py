"""Figures of a training: which numbers they are drawn from, and when."""

from pathlib import Path

import pytest
from PIL import Image

from pipelines.training.figures import TrainFigures


class Run:
    """A run whose journal holds the metrics of an earlier command."""

    def __init__(self, points):
        self._points, self.files = points, []

    def points(self, prefix):
        assert prefix == "train/"
        return {name: dict(values) for name, values in self._points.items()}

    def artifact(self, path, folder):
        with Image.open(path) as picture:
            self.files.append((folder, Path(path).name, picture.size))


def test_a_training_is_drawn_with_the_metrics_of_an_earlier_command(tmp_path):
    before = {"images_per_second": {10: 8.0}, "data_wait": {10: 0.5}, "loss_quartile_1": {10: 2.0}}
    run = Run(before)
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


def test_a_training_without_a_report_is_not_drawn(tmp_path):
    run = Run({})
    TrainFigures(run, str(tmp_path), images_per_step=8).save()
    assert run.files == []
