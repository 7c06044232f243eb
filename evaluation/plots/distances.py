"""Fréchet distance against the number of images, with the line over 1 / N through the points and its limit."""

from collections.abc import Sequence

import numpy as np

from evaluation.metric_names import format_count
from evaluation.plots.style import ACCENT, REAL, add_title_and_legend, label_ticks, new_svg_figure, render_svg
from evaluation.uncertainty import extrapolate

Points = Sequence[tuple[int, float]]


def plot_distances(samples: Points, real: Points) -> str:
    """Plot Fréchet distances against N as an <svg> element for the page; see render_svg.

    samples: (N, distance) of generated samples, at least 2. real: those of held-out real images; may be empty. With
    more than two points of samples, the least-squares line over 1 / N and its value at infinite N are drawn as well.
    Every point shows its values when hovered over.
    """
    largest = max(count for count, _ in [*samples, *real])
    with new_svg_figure(700, 320) as figure:
        axes = figure.subplots()
        axes.grid(clip_on=False)
        if len(samples) > 2:
            line = extrapolate(samples)
            counts = np.linspace(min(count for count, _ in samples), largest, 61)
            axes.plot(counts, line.value + line.slope / counts, color=ACCENT, linewidth=1.5, clip_on=False, gid="fit")
            label = f"N → ∞: {line.value:.4g}"
            axes.axhline(line.value, color=ACCENT, linewidth=1.5, linestyle="--", clip_on=False, label=label)
        for name, colour, points in (("samples", ACCENT, samples), ("held-out real images", REAL, real)):
            for index, (count, value) in enumerate(sorted(points)):
                hover = f"hover: {name}, N = {format_count(count)}: {value:.6g}"
                label = name if index == 0 else ""
                axes.plot(count, value, "o", color=colour, clip_on=False, label=label, gid=hover)
        axes.set_xlim(0, 1.04 * largest)
        axes.set_xlabel("N, number of images")
        axes.set_ylabel("Fréchet distance")
        label_ticks(axes, whole_x=True)
        add_title_and_legend(axes, "")
        return render_svg(figure, "Fréchet distance against N")
