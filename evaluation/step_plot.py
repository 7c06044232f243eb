"""A metric against the training step, as a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evaluation.metric_names import format_count
from evaluation.plot import ACCENT, INK, LINE, REAL, SOFT, canvas, nice_ticks

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_WIDTH, _HEIGHT = 900, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 30, 50, 78
_RADIUS = 5


class StepValue(NamedTuple):
    """A metric of the checkpoint at a step."""

    step: int
    value: float
    error: float = 0.0
    """Standard error; 0: not known."""


def step_plot(
    title: str, points: Sequence[StepValue], floor: float | None = None, images_per_step: int = 0
) -> "Image.Image":
    """Points with error bars, joined in the order of their steps. floor: of real images, drawn as a line.

    images_per_step: the batch size; with it, images seen stand below the steps.

    Raises ValueError without points.
    """
    if not points:
        raise ValueError("Found no points, expected at least one checkpoint's. Evaluate some checkpoints first.")
    points = sorted(points)
    axes = _Axes(points, floor)
    picture, draw = canvas(_WIDTH, _HEIGHT)
    draw.text((_LEFT, 14), title, fill=INK)
    _draw_axes(draw, axes, images_per_step)
    if floor is not None:
        draw.line([(_LEFT, axes.y(floor)), (_WIDTH - _RIGHT, axes.y(floor))], fill=REAL, width=2)
        draw.text((_WIDTH - _RIGHT, axes.y(floor) - 4), f"real images: {floor:.4g}", fill=REAL, anchor="rb")
    draw.line([(axes.x(point.step), axes.y(point.value)) for point in points], fill=ACCENT, width=2)
    for point in points:
        x, y = axes.x(point.step), axes.y(point.value)
        draw.line([(x, axes.y(point.value - point.error)), (x, axes.y(point.value + point.error))], fill=ACCENT)
        draw.ellipse([x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS], fill=ACCENT)
    return picture


class _Axes:
    """From steps and values to pixels."""

    def __init__(self, points: Sequence[StepValue], floor: float | None):
        ends = [point.value + sign * point.error for point in points for sign in (-1, 1)]
        ends += [] if floor is None else [floor]
        self.values = nice_ticks(min(ends), max(ends))
        self.steps = nice_ticks(0, points[-1].step)
        self.low, self.high = min(self.values[0], *ends), max(self.values[-1], *ends)
        self.last = max(1.0, 1.03 * points[-1].step)

    def x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self.last

    def y(self, value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self.high - value) / (self.high - self.low)


def _draw_axes(draw: "ImageDraw.ImageDraw", axes: _Axes, images_per_step: int) -> None:
    for value in axes.values:
        draw.line([(_LEFT, axes.y(value)), (_WIDTH - _RIGHT, axes.y(value))], fill=LINE)
        draw.text((_LEFT - 10, axes.y(value)), f"{value:.6g}", fill=SOFT, anchor="rm")
    for step in axes.steps:
        if step <= axes.last:
            draw.text((axes.x(step), _HEIGHT - _BOTTOM + 12), format_count(round(step)), fill=SOFT, anchor="mt")
            if images_per_step:
                seen = f"{step * images_per_step:.3g}".replace("e+0", "e")
                draw.text((axes.x(step), _HEIGHT - _BOTTOM + 30), seen, fill=SOFT, anchor="mt")
    name = "training step, below: images seen" if images_per_step else "training step"
    draw.text((_WIDTH - _RIGHT, _HEIGHT - 6), name, fill=SOFT, anchor="rb")
