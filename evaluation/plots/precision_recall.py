"""Precision against recall of the checkpoints of a training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluation.plots.style import ACCENT, INK, add_title_and_legend, label_ticks, new_figure, render_image
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

_LABEL_WIDTH, _LABEL_HEIGHT = 0.14, 0.05
"""Size of a label as a share of the points' range."""


class PrecisionRecall(NamedTuple):
    """Precision and recall of the checkpoint at a step (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

    step: int
    precision: float
    recall: float


def plot_precision_recall(title: str, points: Sequence[PrecisionRecall]) -> "Image.Image":
    """Plot precision (fidelity) against recall (diversity), joined in the order of the steps that label the points.

    Raises InvalidInput without points.
    """
    if not points:
        raise InvalidInput("no points to plot", "at least one checkpoint's score", "Evaluate some checkpoints first")
    points = sorted(points)
    with new_figure(560, 560) as figure:
        axes = figure.subplots()
        axes.plot([point.recall for point in points], [point.precision for point in points], "o-", color=ACCENT)
        for point in _spread_out(points):
            position = (point.recall, point.precision)
            axes.annotate(f"{point.step:,}", position, (-6, 5), textcoords="offset points", ha="right", color=INK)
        axes.margins(0.14)
        label_ticks(axes)
        axes.set_xlabel("recall (diversity)")
        axes.set_ylabel("precision (fidelity)")
        add_title_and_legend(axes, title)
        return render_image(figure)


def _spread_out(points: Sequence[PrecisionRecall]) -> list[PrecisionRecall]:
    """Choose points, the last one first, whose labels do not cover each other."""
    recalls, precisions = [point.recall for point in points], [point.precision for point in points]
    width = _LABEL_WIDTH * (max(recalls) - min(recalls))
    height = _LABEL_HEIGHT * (max(precisions) - min(precisions))

    def is_apart(one: PrecisionRecall, other: PrecisionRecall) -> bool:
        return abs(one.recall - other.recall) > width or abs(one.precision - other.precision) > height

    chosen: list[PrecisionRecall] = []
    for point in reversed(points):
        if all(is_apart(point, other) for other in chosen):
            chosen.append(point)
    return chosen
