"""The look of all plots, and how figures are made and rendered: without a display, global state or time stamps.

matplotlib is imported where a figure is made, because it takes half a second.
"""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

COLOURS = {"ink": "#1d2330", "soft": "#5d6675", "line": "#dfe3ea", "accent": "#2457c5", "real": "#1c8a5b"}
"""Colours of titles, other text, grid lines, samples and real images on a light background, by the page's CSS names."""
INK, SOFT, LINE, ACCENT, REAL = COLOURS.values()
SERIES = (ACCENT, REAL, "#c77d11", "#b3365b", "#6b4fb3", "#4d8fa8")
"""Colours of lines and of parts of a bar, in their order."""

_DPI = 100
_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "font.family": "DejaVu Sans",  # inside matplotlib, so that pictures are the same on every machine
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": "large",
    "axes.titleweight": "bold",
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "legend.borderpad": 0.3,
    "legend.borderaxespad": 0.0,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.5,
    "legend.labelcolor": SOFT,
    "svg.fonttype": "none",  # text stays text: it can be searched and takes the page's colours
    "svg.hashsalt": "raydit",
}


@contextmanager
def new_figure(width_px: int, height_px: int, *, font_size: float = 10.0, dpi: int = _DPI) -> Iterator["Figure"]:
    """Yield an empty figure in our style, to be drawn on and rendered inside the block."""
    with _without_messages():
        import matplotlib
        from matplotlib.figure import Figure
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc on this machine says
        matplotlib.rcParams.update({**_STYLE, "font.size": font_size})
        yield Figure(figsize=(width_px / dpi, height_px / dpi), dpi=dpi, layout="constrained")


@contextmanager
def new_svg_figure(width_px: int, height_px: int) -> Iterator["Figure"]:
    """Yield an empty figure for render_svg, with text of 12 px."""
    with new_figure(width_px, height_px, font_size=12.0, dpi=72) as figure:  # SVG has 72 units to the inch
        yield figure


def render_image(figure: "Figure") -> "Image.Image":
    """Return a figure as an RGB image on a white background."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def render_svg(figure: "Figure", description: str) -> str:
    """Return a figure as an <svg> element for an HTML page that defines COLOURS as CSS variables.

    description: what the figure shows, for screen readers.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    found = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert found, "matplotlib writes one <svg> element"
    content = re.sub(r'<g id="hover: ([^"]*)">', r"<g><title>\1</title>", found[2].strip())
    for name, colour in COLOURS.items():
        content = content.replace(colour, f"var(--{name})")
    return f'<svg viewBox="{found[1]}" role="img" aria-label="{escape(description)}">{content}</svg>'


def label_ticks(axes: "Axes", *, whole_x: bool = False) -> None:
    """Label large values with thousands separators. whole_x: put horizontal ticks at round whole numbers only.

    Call it when everything is drawn, because it looks at the limits of the axes.
    """
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        if max(map(abs, axis.get_view_interval())) >= 1000:
            axis.set_major_formatter("{x:,.6g}")
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def add_title_and_legend(axes: "Axes", title: str, **text: Any) -> None:
    """Put the title and, below it, the legend in a row above the axes, where it covers no line.

    text: properties of the title's text.
    """
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1))
    axes.set_title(title, pad=26 if handles else 10, **text)


@contextmanager
def _without_messages() -> Iterator[None]:
    """Silence matplotlib's messages about its cache of fonts while it is imported."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
