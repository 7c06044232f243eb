"""Figures for tracking: lines over steps, and where the time went."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from evaluation.metric_names import format_count
from evaluation.plot import INK, LINE, SOFT, canvas, nice_ticks

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 170, 50, 50
_BAR, _ROW = 46, 104
FIGURES = "figures"
"""Folder of figures in an output, and among the artifacts of a run."""
_COLOURS = ("#2457c5", "#1c8a5b", "#c77d11", "#b3365b", "#6b4fb3", "#4d8fa8")

Point = tuple[int, float]


def lines_figure(title: str, lines: Mapping[str, Sequence[Point]]) -> "Image.Image":
    """Named lines of (step, value) in one pair of axes, each with its name at its end; what is not finite is left out.

    Raises ValueError without any.
    """
    finite = {name: sorted(point for point in points if isfinite(point[1])) for name, points in lines.items()}
    lines = {name: points for name, points in finite.items() if points}
    if not lines:
        raise ValueError("Found no points to draw, expected at least one line with one. Train some steps first.")
    values = [value for points in lines.values() for _, value in points]
    up, last = nice_ticks(min(values), max(values)), max(points[-1][0] for points in lines.values())

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(1, last)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (up[-1] - value) / (up[-1] - up[0])

    picture, draw = canvas(_WIDTH, _HEIGHT)
    draw.text((_LEFT, 14), title, fill=INK)
    for value in up:
        draw.line([(_LEFT, y(value)), (_WIDTH - _RIGHT, y(value))], fill=LINE)
        draw.text((_LEFT - 10, y(value)), f"{value:.6g}", fill=SOFT, anchor="rm")
    for step in nice_ticks(0, last):
        if step <= last:
            draw.text((x(step), _HEIGHT - _BOTTOM + 10), format_count(round(step)), fill=SOFT, anchor="mt")
    draw.text((_WIDTH - _RIGHT, _HEIGHT - 8), "training step", fill=SOFT, anchor="rb")
    names = _apart([y(points[-1][1]) for points in lines.values()])
    for (name, points), at, colour in zip(lines.items(), names, _COLOURS, strict=False):
        draw.line([(x(step), y(value)) for step, value in points], fill=colour, width=2)
        draw.text((_WIDTH - _RIGHT + 10, at), name, fill=colour, anchor="lm")
    return picture


def _apart(places: Sequence[float], distance: float = 18.0) -> list[float]:
    """Heights as near to the wanted ones as lets the texts at them be read."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    placed = [0.0] * len(places)
    lowest = -distance
    for index in order:
        placed[index] = lowest = max(places[index], lowest + distance)
    too_low = max(0.0, lowest - (_HEIGHT - _BOTTOM))
    return [place - too_low for place in placed]


def time_figure(title: str, rows: Mapping[str, Mapping[str, float]]) -> "Image.Image":
    """For each name a bar of its whole time, divided into named parts in seconds. Raises ValueError without any."""
    rows = {name: {part: seconds for part, seconds in parts.items() if seconds > 0} for name, parts in rows.items()}
    rows = {name: parts for name, parts in rows.items() if parts}
    if not rows:
        raise ValueError("Found no time to draw, expected at least one part above 0 s.")
    names = dict.fromkeys(part for parts in rows.values() for part in parts)
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    picture, draw = canvas(_WIDTH, _TOP + _ROW * len(rows))
    draw.text((20, 14), title, fill=INK)
    for row, (name, parts) in enumerate(rows.items()):
        top, total = _TOP + _ROW * row, sum(parts.values())
        draw.text((20, top), f"{name}: {total:,.1f} s", fill=SOFT)
        _draw_bar(draw, top + 22, parts, colours)
        _draw_legend(draw, top + 22 + _BAR + 8, parts, colours)
    return picture


def _draw_bar(draw: "ImageDraw.ImageDraw", top: float, parts: Mapping[str, float], colours: Mapping[str, str]) -> None:
    left, scale = 20.0, (_WIDTH - 40) / sum(parts.values())
    for name, seconds in parts.items():
        draw.rectangle([left, top, left + seconds * scale, top + _BAR - 8], fill=colours[name])
        left += seconds * scale


def _draw_legend(
    draw: "ImageDraw.ImageDraw", top: float, parts: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    left, total = 20.0, sum(parts.values())
    for name, seconds in parts.items():
        text = f"{name} {seconds / total:.1%}"
        draw.rectangle([left, top, left + 10, top + 10], fill=colours[name])
        draw.text((left + 16, top - 3), text, fill=INK)
        left += 16 + draw.textlength(text) + 24


def timings_figure(timings: Mapping[str, float]) -> "Image.Image":
    """The timings of a report: of the command, and of its workers, all of them together."""
    parts = {name.removesuffix("_seconds"): seconds for name, seconds in timings.items()}
    workers = {name.removeprefix("workers_"): value for name, value in parts.items() if name.startswith("workers_")}
    rest = {name: value for name, value in parts.items() if not name.startswith("workers_")}
    rows = {"evaluation": rest, "workers, of all together": workers}
    return time_figure("where the time of the evaluation went", rows)
