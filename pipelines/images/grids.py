"""Draw grids of images with the name of a class at the left of each row."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

GAP_PX = 2
MIN_IMAGE_PX = 64
"""Images smaller than this are enlarged by an integer factor, without interpolation."""
MAX_CLASSES = 20
"""Most rows of a grid of classes."""
MAX_FONT_PX = 20
"""Size of names beside large images: a fifth of the height of a row, and no more than this."""
MAX_NAME = 32
"""Most characters of a name that are shown; a longer one ends in three dots."""

OTHER_FORMATS = (
    *(".avif", ".bmp", ".eps", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".pdf", ".ps", ".svg", ".tif"),
    *(".tiff", ".webp", ".json", ".npy", ".npz"),
)
"""Endings of names that programs take for another format than PNG."""


def labelled_grid(rows: Sequence[tuple[str, np.ndarray]]) -> "Image.Image":
    """Draw a row for each (name, images uint8 (N, H, W, 3)). Rows may differ in length."""
    from PIL import Image, ImageDraw, ImageFont

    rows = [(_shorten(name), images) for name, images in rows]
    height, width = rows[0][1].shape[1:3]
    zoom = max(1, -(-MIN_IMAGE_PX // height))
    cell_w, cell_h = width * zoom + GAP_PX, height * zoom + GAP_PX
    font = ImageFont.load_default(size=max(12, min(cell_h // 5, MAX_FONT_PX)))
    margin = 2 * GAP_PX + int(max(font.getlength(name) for name, _ in rows))
    columns = max(len(images) for _, images in rows)
    grid = Image.new("RGB", (margin + columns * cell_w, len(rows) * cell_h + GAP_PX), "white")
    draw = ImageDraw.Draw(grid)
    for y, (name, images) in enumerate(rows):
        draw.text((GAP_PX, y * cell_h + cell_h // 2), name, fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            enlarged = np.kron(image, np.ones((zoom, zoom, 1), np.uint8))
            grid.paste(Image.fromarray(enlarged), (margin + x * cell_w, y * cell_h + GAP_PX))
    return grid


def _shorten(name: str) -> str:
    """Return a name in one line, without its end if it is long: the margin is as wide as the longest name."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."


def class_grid(
    images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, columns: int = 10
) -> "Image.Image":
    """Draw a row for each class that has images (at most MAX_CLASSES), or a square grid if there are no classes.

    images: uint8 (N, H, W, 3). labels: (N,) class numbers.
    """
    if not class_names:
        side = max(1, int(min(len(images), columns**2) ** 0.5))
        return labelled_grid([("", images[row * side : (row + 1) * side]) for row in range(side)])
    present = np.unique(labels)[:MAX_CLASSES]
    return labelled_grid([(class_names[label], images[labels == label][:columns]) for label in present])


def encode_png(image: "Image.Image") -> bytes:
    """Return an image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def require_png_name(path: str) -> None:
    """Raise InvalidInput if the name of a PNG file to be written, a path or URI, ends as files of another format do."""
    stem, dot, ending = path.partition("?")[0].rpartition(".")
    if f"{dot}{ending}".lower() in OTHER_FORMATS:
        raise InvalidInput(
            f"--out: found {path}, and a grid is written as PNG, which loses nothing",
            "a name that ends in .png",
            f"use --out {stem}.png, and convert it if you need another format",
        )


def save_png(image: "Image.Image", path: str) -> str:
    """Write an image as PNG to a path or URI, atomically. Returns the path."""
    storage.write_atomically(path, encode_png(image))
    return path
