"""What a search over sampling settings found: distance, ratio to real images and recall against a sample's cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluation.plots.style import ACCENT, LINE, REAL, new_figure, render_image
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image


_SIZES = {"o": 6, "*": 14}


class TunedPoint(NamedTuple):
    """A candidate as it was last measured."""

    cost: float
    """FLOPs of a sample."""
    distance: float
    """Frechet distance, as it is expected to be on the largest number of samples."""
    ratio: float | None
    """Distance in units of that of real images, mean over extractors; None: unknown."""
    recall: float | None
    num_samples: int
    """Samples that it was measured on: those that were dropped early have few."""
    is_best: bool


def plot_tuning(title: str, points: Sequence[TunedPoint]) -> "Image.Image":
    """Plot three panels against the cost of a sample. Candidates that were dropped early are pale.

    Raises InvalidInput without points.
    """
    if not points:
        raise InvalidInput("no points to plot", "at least one candidate", "tune a checkpoint")
    panels: dict[str, list[float | None]] = {
        "distance": [point.distance for point in points],
        "ratio to real images": [point.ratio for point in points],
        "recall": [point.recall for point in points],
    }
    known = {name: values for name, values in panels.items() if any(value is not None for value in values)}
    with new_figure(380 * len(known), 380) as figure:
        for number, (name, values) in enumerate(known.items(), start=1):
            axes = figure.add_subplot(1, len(known), number)
            _plot_panel(axes, points, values)
            axes.set_xlabel("GFLOPs of a sample")
            axes.set_ylabel(name)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(handles))
        return render_image(figure)


def _plot_panel(axes: "Axes", points: Sequence[TunedPoint], values: Sequence[float | None]) -> None:
    last = max(point.num_samples for point in points)
    kinds = {
        "dropped earlier": (lambda point: not point.is_best and point.num_samples < last, "o", LINE),
        f"on {last:,} samples": (lambda point: not point.is_best and point.num_samples == last, "o", ACCENT),
        "best": (lambda point: point.is_best, "*", REAL),
    }
    for title, (belongs, marker, colour) in kinds.items():
        shown = [(point.cost / 1e9, value) for point, value in zip(points, values, strict=True) if belongs(point)]
        known = [(cost, value) for cost, value in shown if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker, color=colour, markersize=_SIZES[marker], label=title)
    axes.margins(0.1)
