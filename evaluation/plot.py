"""Frechet distance against N as an inline SVG: points, the line over 1 / N through them, and where it leads."""

from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from typing import TYPE_CHECKING

from evaluation.metric_names import format_count
from evaluation.uncertainty import at_infinity

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Points = Sequence[tuple[int, float]]
INK, SOFT, LINE, ACCENT, REAL = "#1d2330", "#5d6675", "#dfe3ea", "#2457c5", "#1c8a5b"
"""Colours of pictures: titles, other text, lines of a grid, samples, real images."""

_WIDTH, _HEIGHT = 700, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 16, 44
_FIT_STEPS = 60


def distance_plot(points: Points, real: Points) -> str:
    """points: (N, distance) of samples, at least 2; real: of held-out real images. The colours are the page's."""
    line = at_infinity(points) if len(points) > 2 else None
    values = [value for _, value in [*points, *real]] + ([line.value] if line else [])
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    largest = max(count for count, _ in [*points, *real])

    def x(count: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * count / (1.04 * largest)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [_axes(x, y, ticks, nice_ticks(0, largest))]
    if line:
        smallest = min(count for count, _ in points)
        counts = [smallest + (largest - smallest) * step / _FIT_STEPS for step in range(_FIT_STEPS + 1)]
        path = " ".join(f"{x(count):.1f},{y(line.value + line.slope / count):.1f}" for count in counts)
        at, end = y(line.value), _WIDTH - _RIGHT
        parts.append(f'<polyline class="fit" points="{path}"/>')
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        below = at + 15 if line.slope > 0 else at - 6  # on the side where the curve is not
        parts.append(f'<text x="{end}" y="{below:.1f}" text-anchor="end">N → ∞: {line.value:.4g}</text>')
    parts += [_point("point", "samples", count, value, x, y) for count, value in points]
    parts += [_point("real", "held-out real images", count, value, x, y) for count, value in real]
    parts.append(_legend(real))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Fréchet distance against N">'
        f"{''.join(parts)}</svg>"
    )


def canvas(width: int, height: int) -> tuple["Image.Image", "ImageDraw.ImageDraw"]:
    """An empty picture, and what draws on it in the letters of all of them."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(size=15)
    return picture, draw


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to ten multiples of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** floor(log10(span / 4))
    step = next(power * factor for factor in (10, 5, 2, 1) if power * factor <= span / 4 * 1.0001)
    first = floor(low / step + 1e-9)
    last = max(ceil(high / step - 1e-9), first + 1)
    return [index * step for index in range(first, last + 1)]


def _axes(x: Callable, y: Callable, ticks: Sequence[float], counts: Sequence[float]) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ticks:
        at = y(value)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for count in counts:
        if x(count) <= right:
            label = format_count(round(count))
            parts.append(f'<text x="{x(count):.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">N, number of images</text>')
    return "".join(parts)


def _legend(real: Points) -> str:
    names = {"point": "samples"} | ({"real": "held-out real images"} if real else {})
    parts = []
    for index, (kind, name) in enumerate(names.items()):
        at = _LEFT + 110 * index
        parts.append(f'<circle class="{kind}" cx="{at + 5}" cy="{_HEIGHT - 10}" r="4.5"/>')
        parts.append(f'<text x="{at + 15}" y="{_HEIGHT - 6}">{name}</text>')
    return "".join(parts)


def _point(kind: str, of: str, count: int, value: float, x: Callable, y: Callable) -> str:
    title = f"<title>{of}, N = {format_count(count)}: {value:.6g}</title>"
    return f'<circle class="{kind}" cx="{x(count):.1f}" cy="{y(value):.1f}" r="4.5">{title}</circle>'
