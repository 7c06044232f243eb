"""The picture of a metric against the step."""

import numpy as np
import pytest

from evaluation.plot import ACCENT, REAL
from evaluation.step_plot import StepValue, step_plot


def pixels(picture, colour):
    """Rows and columns of a colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return np.nonzero((np.asarray(picture) == wanted).all(axis=-1))


def test_points_stand_where_steps_and_values_say():
    """Of two points the later is to the right, the smaller value below; order of arrival does not matter."""
    points = [StepValue(1000, 40.0), StepValue(500, 80.0)]
    picture = step_plot("fid_50k", points)
    rows, columns = pixels(picture, ACCENT)
    left, right = columns.argmin(), columns.argmax()
    assert rows[left] < rows[right] and columns[right] - columns[left] > 300
    assert np.array_equal(np.asarray(picture), np.asarray(step_plot("fid_50k", points[::-1])))


def test_errors_are_bars_and_the_floor_a_line():
    plain, sure = (step_plot("x", [StepValue(10, 5.0, 0.0), StepValue(20, 9.0, error)]) for error in (0.0, 3.0))
    (plain_rows, plain_columns), (rows, columns) = pixels(plain, ACCENT), pixels(sure, ACCENT)
    assert np.ptp(rows[columns == columns.max() - 5]) > 2 * np.ptp(plain_rows[plain_columns == plain_columns.max() - 5])
    rows, columns = pixels(step_plot("x", [StepValue(10, 5.0)], floor=1.0), REAL)
    assert np.ptp(columns) > 600


def test_one_point_is_a_picture_and_none_is_an_error():
    assert step_plot("x", [StepValue(0, 0.0)]).size == (900, 480)
    with pytest.raises(ValueError, match="Found no points, expected at least one"):
        step_plot("x", [])


def test_images_seen_stand_below_the_steps():
    plain, both = (np.asarray(step_plot("x", [StepValue(1000, 5.0)], images_per_step=each)) for each in (0, 256))
    changed = np.nonzero((plain != both).any(axis=(1, 2)))[0]
    assert len(changed) and changed.min() > 425  # below the axis, nothing else moves
