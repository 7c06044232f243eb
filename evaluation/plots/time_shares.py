"""Where time went: bars that are divided into named parts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaluation.plots.style import SERIES, add_title_and_legend, label_ticks, new_figure, render_image
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image


def plot_time_shares(title: str, rows: Mapping[str, Mapping[str, float]]) -> "Image.Image":
    """Plot a bar for each row, divided into the row's named parts in seconds.

    Raises InvalidInput if no part is above 0 s.
    """
    rows = {name: {part: seconds for part, seconds in parts.items() if seconds > 0} for name, parts in rows.items()}
    rows = {name: parts for name, parts in rows.items() if parts}
    if not rows:
        raise InvalidInput("no time to plot", "at least one part above 0 s", "")
    names = dict.fromkeys(part for parts in rows.values() for part in parts)
    colours = {name: SERIES[index % len(SERIES)] for index, name in enumerate(names)}
    with new_figure(900, 45 + 135 * len(rows)) as figure:
        figure.suptitle(title, x=0.013, ha="left", fontweight="bold")
        for axes, (name, parts) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
            _draw_bar(axes, parts, colours)
            add_title_and_legend(axes, f"{name}: {sum(parts.values()):,.1f} s", fontsize="medium", fontweight="normal")
        return render_image(figure)


def _draw_bar(axes: "Axes", parts: Mapping[str, float], colours: Mapping[str, str]) -> None:
    total, start = sum(parts.values()), 0.0
    for name, seconds in parts.items():
        axes.barh(0, seconds, left=start, color=colours[name], label=f"{name} {seconds / total:.1%}")
        start += seconds
    axes.set_xlim(0, total)
    axes.set_ylim(-0.4, 0.4)
    axes.set_xlabel("seconds")
    axes.set_yticks([])
    axes.grid(False)
    label_ticks(axes)
    for spine in axes.spines.values():
        spine.set_visible(False)
