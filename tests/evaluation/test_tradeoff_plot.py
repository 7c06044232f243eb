"""The picture of precision against recall."""

import numpy as np
import pytest

from evaluation.plot import ACCENT
from evaluation.tradeoff_plot import Tradeoff, tradeoff_plot

POINTS = [Tradeoff(1000, 0.4, 0.3), Tradeoff(2000, 0.8, 0.6)]


def test_the_truer_and_more_varied_stands_up_and_to_the_right():
    wanted = [int(ACCENT[start : start + 2], 16) for start in (1, 3, 5)]
    picture = np.asarray(tradeoff_plot("protocol", POINTS))
    rows, columns = np.nonzero((picture == wanted).all(axis=-1))
    left, right = columns.argmin(), columns.argmax()
    assert rows[right] < rows[left] and columns[right] - columns[left] > 300
    assert np.array_equal(picture, np.asarray(tradeoff_plot("protocol", POINTS[::-1])))


def test_one_point_is_a_picture_and_none_is_an_error():
    assert tradeoff_plot("x", POINTS[:1]).size == (560, 560)
    with pytest.raises(ValueError, match="Found no points, expected at least one"):
        tradeoff_plot("x", [])
