"""Figures for tracking."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaluation.plots.time_shares import plot_time_shares

if TYPE_CHECKING:
    from PIL import Image

FIGURES = "figures"
"""Folder of figures in an output, and among the artifacts of a run."""


def plot_timings(timings: Mapping[str, float]) -> "Image.Image":
    """Plot the timings of a report: one bar for the command, and one for its workers' times added up."""
    parts = {name.removesuffix("_seconds"): seconds for name, seconds in timings.items()}
    workers = {name.removeprefix("workers_"): value for name, value in parts.items() if name.startswith("workers_")}
    command = {name: value for name, value in parts.items() if not name.startswith("workers_")}
    return plot_time_shares(
        "Where the time of the evaluation went", {"evaluation": command, "workers, added up": workers}
    )
