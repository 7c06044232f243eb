"""Precision against recall of the checkpoints of a training, as a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluation.metric_names import format_count
from evaluation.plot import ACCENT, INK, LINE, SOFT, canvas, nice_ticks

if TYPE_CHECKING:
    from PIL import Image

_SIZE = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 40, 50, 60
_RADIUS = 5


class Tradeoff(NamedTuple):
    """Of the checkpoint at a step (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

    step: int
    precision: float
    recall: float


def tradeoff_plot(title: str, points: Sequence[Tradeoff]) -> "Image.Image":
    """Points named by their steps, joined in that order: up is truer, to the right is more varied.

    Raises ValueError without points.
    """
    if not points:
        raise ValueError("Found no points, expected at least one checkpoint's. Evaluate some checkpoints first.")
    points = sorted(points)
    across = nice_ticks(min(point.recall for point in points), max(point.recall for point in points))
    up = nice_ticks(min(point.precision for point in points), max(point.precision for point in points))

    def x(recall: float) -> float:
        return _LEFT + (_SIZE - _LEFT - _RIGHT) * (recall - across[0]) / (across[-1] - across[0])

    def y(precision: float) -> float:
        return _TOP + (_SIZE - _TOP - _BOTTOM) * (up[-1] - precision) / (up[-1] - up[0])

    picture, draw = canvas(_SIZE, _SIZE)
    draw.text((_LEFT, 10), title, fill=INK)
    draw.text((_LEFT, 30), "precision", fill=SOFT)
    draw.text((_SIZE - _RIGHT, _SIZE - 10), "recall", fill=SOFT, anchor="rb")
    for value in up:
        draw.line([(_LEFT, y(value)), (_SIZE - _RIGHT, y(value))], fill=LINE)
        draw.text((_LEFT - 10, y(value)), f"{value:.4g}", fill=SOFT, anchor="rm")
    for value in across:
        draw.line([(x(value), _TOP), (x(value), _SIZE - _BOTTOM)], fill=LINE)
        draw.text((x(value), _SIZE - _BOTTOM + 12), f"{value:.4g}", fill=SOFT, anchor="mt")
    draw.line([(x(point.recall), y(point.precision)) for point in points], fill=ACCENT, width=2)
    for point in points:
        across_at, up_at = x(point.recall), y(point.precision)
        draw.ellipse([across_at - _RADIUS, up_at - _RADIUS, across_at + _RADIUS, up_at + _RADIUS], fill=ACCENT)
        draw.text((across_at, up_at - 10), format_count(point.step), fill=INK, anchor="mb")
    return picture
