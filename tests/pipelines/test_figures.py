"""Figures: each line is where its numbers are, and the time is divided as it was spent."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.figures import _COLOURS, _LEFT, _RIGHT, _WIDTH, lines_figure, time_figure, timings_figure
from pipelines.training.figures import TrainFigures


def pixels(picture, colour):
    """Rows and columns that have a colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return np.nonzero((np.asarray(picture.convert("RGB")) == wanted).all(axis=-1))


def test_lines_run_from_their_first_step_to_the_last_and_what_is_higher_stands_higher():
    picture = lines_figure(
        "loss", {"low": [(0, 1.0), (100, 0.5)], "high": [(50, 2.0), (100, 2.5)], "none": [(0, math.nan)]}
    )
    (low_rows, low_columns), (high_rows, high_columns) = (pixels(picture, colour) for colour in _COLOURS[:2])
    end = _WIDTH - _RIGHT
    inside = low_columns <= end
    assert abs(low_columns.min() - _LEFT) <= 2 and high_rows.max() < low_rows[inside].min()
    assert abs(high_columns.min() - (_LEFT + end) / 2) <= 2
    falling = low_rows[inside]
    assert falling[low_columns[inside].argmax()] > falling[low_columns[inside].argmin()]


def test_names_of_lines_that_end_together_do_not_cover_each_other():
    together = lines_figure("loss", {name: [(0, 1.0), (10, 1.0)] for name in ("one", "two", "three", "four")})
    rows = [pixels(together, colour)[0] for colour in _COLOURS[1:4]]
    names = sorted((found[found > 0].min(), found.max()) for found in rows)
    assert all(later[1] > earlier[1] + 10 for earlier, later in zip(names, names[1:], strict=False))


def test_a_bar_is_divided_in_the_proportion_of_its_parts():
    picture = time_figure("time", {"training": {"steps": 75.0, "nothing": 0.0, "data wait": 25.0}})
    counts = [len(pixels(picture, colour)[0]) for colour in _COLOURS[:3]]
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.05) and counts[2] == 0


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="Found no points to draw, expected at least one line"):
        lines_figure("x", {"a": []})
    with pytest.raises(ValueError, match="Found no time to draw, expected at least one part"):
        time_figure("x", {"a": {"b": 0.0}})


def test_timings_of_workers_stand_in_a_row_of_their_own():
    own = {"features_seconds": 10.0, "scoring_seconds": 1.0}
    both = timings_figure(own | {"workers_sampling_seconds": 8.0, "workers_extraction_seconds": 2.0})
    assert both.size[1] > timings_figure(own).size[1]


class Run:
    """What a training is told to, with what an earlier command has told."""

    def __init__(self, points):
        self._points, self.files = points, []

    def points(self, prefix):
        assert prefix == "train/"
        return {name: dict(values) for name, values in self._points.items()}

    def artifact(self, path, folder):
        self.files.append((folder, Path(path).name, Image.open(path).size))


def test_a_training_is_drawn_with_what_an_earlier_command_told(tmp_path):
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
