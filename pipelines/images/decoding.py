"""Decode image files to RGB, and describe an image that cannot be used in words that are the same in every run."""

import io
import re
from typing import TYPE_CHECKING

import numpy as np

from raydit.lfs import is_lfs_pointer

if TYPE_CHECKING:
    from PIL import Image

EARLIER_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".webp", ".avif", ".bmp", ".gif", ".ppm", ".pgm"} | {
    ".tif",
    ".tiff",
    ".heic",  # Pillow cannot decode it. It is listed so that such images are quarantined instead of ignored.
}
"""Suffixes that images.reading = "earlier" knows."""
FORMAT_OF_SUFFIX = {".tga": "TGA", ".dib": "DIB", ".pcx": "PCX", ".qoi": "QOI", ".dds": "DDS", ".sgi": "SGI"}
"""Formats that are decoded only in files of these names: some have no mark by which their content is recognised."""
SUFFIXES = EARLIER_SUFFIXES | FORMAT_OF_SUFFIX.keys()
SUFFIXES |= {".jpe", ".jif", ".jfi", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng", ".avifs", ".pbm", ".pnm", ".pfm"}
SUFFIXES |= {".jxl", ".heif", ".hif", ".pam", ".exr", ".hdr"}  # Pillow cannot decode these, as .heic
"""Suffixes of file names that are listed as images, in lower case."""
OTHER_PICTURES = {
    ".psd",
    ".xcf",
    ".svg",
    ".ico",
    ".eps",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
    ".orf",
    ".rw2",
}
"""Suffixes of pictures that often lie beside images of which they are the source; they are not listed, and said so."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Formats that are decoded whatever the file's name. Pillow knows more, but its EPS reader starts Ghostscript."""
LOW_VALUES = "raydit_low_values"
"""Key in an image's `info`, true if its file has 16 bits a channel, of which only the lower 12 are used."""


def is_image(name: str, *, earlier: bool = False) -> bool:
    """Return whether a file name has the suffix of an image. earlier: know EARLIER_SUFFIXES alone."""
    return name[name.rfind(".") :].lower() in (EARLIER_SUFFIXES if earlier else SUFFIXES)


def decode_image(data: bytes | None, name: str = "") -> "Image.Image":
    """Decode an image file to RGB: turned upright by its EXIF tag, with transparency composited over white.

    16-bit channels keep their high byte; LOW_VALUES marks images of which that leaves almost nothing. TIFF files of 12
    bits are scaled. CMYK is converted as Adobe stores it in JPEG. The first of several frames is used. Colour profiles
    are not applied, as in ImageFolder and ADM. name: of the file; its suffix allows the formats of FORMAT_OF_SUFFIX.
    Raises an exception if the data is no image, is truncated, or decodes to more than 179 million pixels (Pillow's
    DecompressionBombError).
    """
    from PIL import Image

    # The messages below are written to the quarantine, where they must stay the same from version to version.
    if not data:
        raise ValueError("empty: no bytes")
    if is_lfs_pointer(data):
        raise ValueError("a Git LFS pointer in place of the image: run git lfs pull where the images come from")
    opened = _open(data, name)
    opened.load()  # before the EXIF tag is read, which would hide the error of a truncated file
    image = _turn_upright(opened)
    low_values = False
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        image, low_values = _keep_high_byte(image, _declared_bits(data, opened))
    elif _declared_bits(data, opened) == 16:  # Pillow has kept the high byte
        low_values = _is_low(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info[LOW_VALUES] = low_values
    return image


def try_decode(data: bytes | None | Exception, name: str = "") -> "Image.Image | Exception":
    """Decode an image, or return the exception that explains why it cannot be used; pass on an exception as it is."""
    if isinstance(data, Exception):
        return data
    try:
        return decode_image(data, name)
    except Exception as error:
        return error


def _open(data: bytes, name: str) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    Image.init()
    further = FORMAT_OF_SUFFIX.get(name[name.rfind(".") :].lower())
    formats = [format for format in (*FORMATS, *filter(None, [further])) if format in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Exception as error:
        if (intact := _without_exif_of_avif(data)) != data:
            try:
                return Image.open(io.BytesIO(intact), formats=formats)
            except Exception:
                pass  # broken in another way, which the first error describes
        if not isinstance(error, UnidentifiedImageError):
            raise
        # Pillow's own message holds a memory address, which changes from run to run.
        message = f"no image format known here: {len(data):,} bytes from {data[:8]!r}"
        raise UnidentifiedImageError(message) from None


def _without_exif_of_avif(data: bytes) -> bytes:
    """Rename the EXIF item of an AVIF file, so that decoders skip it."""
    # Pillow reads it when it opens a file, and refuses an intact image if it is broken.
    if data[4:8] != b"ftyp":
        return data
    return re.sub(rb"(infe.{8,10}?)Exif", rb"\1skip", data, count=1, flags=re.DOTALL)


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
    try:
        turn = upright.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises anything from SyntaxError to struct.error for broken tags of an intact image
        turn = None
    return image if turn is None else image.transpose(turn)


def _declared_bits(data: bytes, opened: "Image.Image") -> int | None:
    """Return the bits per channel that a PNG or TIFF file declares; None for other formats."""
    if opened.format == "PNG":
        return data[24]  # the fifth field of the header, which is the first chunk
    if opened.format == "TIFF":
        bits = opened.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else bits
    return None


def _is_low(image: "Image.Image") -> bool:
    """Return whether all colours of an 8-bit image are below 16, the high byte of 4,096, and not all are 0."""
    colours = [np.asarray(image.getchannel(band)) for band in image.getbands() if band not in "Aa"]
    return 0 < max(int(values.max()) for values in colours) < 16


def _keep_high_byte(image: "Image.Image", bits: int | None) -> "tuple[Image.Image, bool]":
    """Convert 16-bit grey to 8 bits by its high byte. Pillow's own conversion clips at 255 instead of scaling.

    bits: as the file declares them; values of 12 bits keep their upper eight. Also returns whether all values are
    below 4,096, as of cameras with 10 or 12 bits, though the file declares no such number.
    """
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(
            f"found grey values of {values.dtype} from {values.min():g} to {values.max():g}, expected 8 or 16 bits: "
            "which of them is white is not known"
        )
    shift = 4 if bits == 12 else 8
    is_low = shift == 8 and 0 < int(values.max()) < 4096
    return Image.fromarray((values.astype(np.uint32) >> shift).astype(np.uint8)), is_low


def quarantine_reason(error: Exception) -> str:
    """Return an error as one line that is the same in every run, for the quarantine: no memory addresses."""
    text = " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"
