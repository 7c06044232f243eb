"""Values over the steps of a training: a metric of its checkpoints, or any number of lines."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation.plots.style import ACCENT, REAL, SERIES, add_title_and_legend, label_ticks, new_figure, render_image
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image


class StepValue(NamedTuple):
    """A metric of the checkpoint at a step."""

    step: int
    value: float
    error: float = 0.0
    """Standard error; 0: unknown."""


def plot_metric_over_steps(
    title: str,
    points: Sequence[StepValue],
    *,
    label: str = "",
    real_baseline: float | None = None,
    images_per_step: int = 0,
) -> "Image.Image":
    """Plot a metric with error bars against the training step.

    label: what the values are. real_baseline: the metric of real images, drawn as a line. images_per_step: the global
    batch size; if given, an axis below the steps counts the images seen. Raises InvalidInput without points.
    """
    if not points:
        raise InvalidInput("no points to plot", "at least one checkpoint's score", "Evaluate some checkpoints first")
    steps, values, errors = zip(*sorted(points), strict=True)
    with new_figure(900, 480) as figure:
        axes = figure.subplots()
        name = "samples ± standard error" if any(errors) else "samples" if real_baseline is not None else ""
        axes.errorbar(steps, values, errors if any(errors) else None, fmt="o-", color=ACCENT, capsize=4, label=name)
        if real_baseline is not None:
            axes.axhline(real_baseline, color=REAL, linestyle="--", label=f"real images: {real_baseline:.4g}")
        axes.set_xlim(0, max(1.0, 1.03 * steps[-1]))
        axes.set_ylabel(label)
        _show_steps(axes, images_per_step)
        add_title_and_legend(axes, title)
        return render_image(figure)


def plot_lines(title: str, lines: Mapping[str, Sequence[tuple[int, float]]], *, label: str = "") -> "Image.Image":
    """Plot named lines of (step, value). Values that are not finite are left out.

    label: what the values are. Raises InvalidInput if nothing is left.
    """
    finite = {name: sorted(point for point in points if isfinite(point[1])) for name, points in lines.items()}
    lines = {name: points for name, points in finite.items() if points}
    if not lines:
        raise InvalidInput("no points to plot", "at least one line with one", "Train some steps first")
    with new_figure(900, 420) as figure:
        axes = figure.subplots()
        axes.set_prop_cycle(color=SERIES)
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name if name != label else "", marker="o" if len(points) == 1 else "")
        axes.set_xlim(0, max(1, *(points[-1][0] for points in lines.values())))
        axes.set_ylabel(label)
        _show_steps(axes)
        add_title_and_legend(axes, title)
        return render_image(figure)


def _show_steps(axes: "Axes", images_per_step: int = 0) -> None:
    """Label the horizontal axis with steps, and with the images seen below them if images_per_step is given."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("training step")
    label_ticks(axes, whole_x=True)
    if images_per_step:
        seen = axes.secondary_xaxis(
            -0.17, functions=(partial(np.multiply, images_per_step), partial(np.multiply, 1 / images_per_step))
        )
        seen.spines["bottom"].set_visible(False)
        seen.tick_params(length=0)
        seen.set_xlabel("images seen")
        seen.xaxis.set_major_formatter(EngFormatter(sep=""))
