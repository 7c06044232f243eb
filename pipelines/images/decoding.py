"""Encoded bytes to RGB images, and the reason why not in words that are the same in every run."""

import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".webp", ".avif", ".bmp", ".gif", ".ppm", ".pgm"} | {
    ".tif",
    ".tiff",
    ".heic",  # Pillow cannot decode it; listed, so that such images end in the quarantine and not in silence
}

# Not all that Pillow can open: EPS starts Ghostscript, and no data set is made of fonts and film.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")


def is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES


def decode(data: bytes | None) -> "Image.Image":
    """Encoded bytes -> RGB image, turned upright by its EXIF tag; transparency is laid over white.

    16-bit channels keep their high byte. CMYK is converted as Adobe stores it in JPEG. Of several frames the first
    counts; colour profiles are not applied, as in ImageFolder and ADM. Raises an exception for what is no image, is
    cut off, or unfolds to more than 179 million pixels (Pillow's DecompressionBombError).
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError("empty: no bytes")
    try:
        opened = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        # Pillow's own words hold an address in memory; what is written down of an image must not change by the run.
        raise UnidentifiedImageError(f"no image format known here: {len(data):,} bytes from {data[:8]!r}") from None
    opened.load()  # before the EXIF tag is looked at: that hides the error of a file that is cut off
    image = _upright(opened)
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        image = _grey_of_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(image: "Image.Image") -> "Image.Image":
    # ImageOps.exif_transpose also rewrites all tags, and fails for a whole image where one of them is broken.
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


def _grey_of_16_bits(image: "Image.Image") -> "Image.Image":
    """The high byte: Pillow's own conversion clips at 255 instead of scaling."""
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(
            f"found grey values of {values.dtype} from {values.min():g} to {values.max():g}, expected 8 or 16 bits: "
            "which of them is white is not known"
        )
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def reason(error: Exception) -> str:
    """An error in one line, the same in every run: it is written into the quarantine."""
    text = " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"
