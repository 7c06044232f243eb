"""Decode image files to RGB, and describe an image that cannot be used in words that are the same in every run."""

import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".webp", ".avif", ".bmp", ".gif", ".ppm", ".pgm"} | {
    ".tif",
    ".tiff",
    ".heic",  # Pillow cannot decode it. It is listed so that such images are quarantined instead of ignored.
}
"""Suffixes of file names that are listed as images, in lower case."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Formats that are decoded. Pillow knows more, but its EPS reader starts Ghostscript."""


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return name[name.rfind(".") :].lower() in SUFFIXES


def decode_image(data: bytes | None) -> "Image.Image":
    """Decode an image file to RGB: turned upright by its EXIF tag, with transparency composited over white.

    16-bit channels keep their high byte. CMYK is converted as Adobe stores it in JPEG. The first of several frames is
    used. Colour profiles are not applied, as in ImageFolder and ADM. Raises an exception if the data is no image, is
    truncated, or decodes to more than 179 million pixels (Pillow's DecompressionBombError).
    """
    from PIL import Image, UnidentifiedImageError

    # The messages below are written to the quarantine, where they must stay the same from version to version.
    if not data:
        raise ValueError("empty: no bytes")
    try:
        opened = Image.open(io.BytesIO(data), formats=_available_formats())
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address, which changes from run to run.
        raise UnidentifiedImageError(f"no image format known here: {len(data):,} bytes from {data[:8]!r}") from None
    opened.load()  # before the EXIF tag is read, which would hide the error of a truncated file
    image = _turn_upright(opened)
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        image = _keep_high_byte(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def try_decode(data: bytes | None | Exception) -> "Image.Image | Exception":
    """Decode an image, or return the exception that explains why it cannot be used; pass on an exception as it is."""
    if isinstance(data, Exception):
        return data
    try:
        return decode_image(data)
    except Exception as error:
        return error


def _available_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _turn_upright(image: "Image.Image") -> "Image.Image":
    # ImageOps.exif_transpose also rewrites all tags, and fails on an intact image if one of its tags is broken.
    from PIL import ExifTags, Image

    turns = Image.Transpose
    upright = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    turn = upright.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _keep_high_byte(image: "Image.Image") -> "Image.Image":
    """Convert 16-bit grey to 8 bits by its high byte. Pillow's own conversion clips at 255 instead of scaling."""
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(
            f"found grey values of {values.dtype} from {values.min():g} to {values.max():g}, expected 8 or 16 bits: "
            "which of them is white is not known"
        )
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def quarantine_reason(error: Exception) -> str:
    """Return an error as one line that is the same in every run, for the quarantine: no memory addresses."""
    text = " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"
