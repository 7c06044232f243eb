"""Decode image files to RGB, and describe an image that cannot be used in words that are the same in every run."""

import io
import re
from collections.abc import Iterator
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
MAX_PIXELS = 178_956_970
"""Largest image that is decoded: 716 MB as RGB. It is twice the size of which Pillow warns."""
STRIP_PIXELS = 2**22
"""Pixels that are converted at a time where a conversion needs further memory."""
JPEG_SCAN = b"\xff\xda"
MAX_SCANNED_PIXELS = 2**36
"""Pixels of all scans of a progressive JPEG: 384 scans of the largest image, which take about a minute."""
MAX_COMMENTS = 1000
"""Comments in a plain-text PNM file."""
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
    Raises an exception if the data is no image, is truncated, decodes to more than MAX_PIXELS (Pillow's
    DecompressionBombError), or takes far longer to decode than its length and pixels explain.

    Memory: at most 8 bytes a pixel, for the image as it is stored and as RGB; Pillow takes 4 for RGB.
    """
    # The messages below are written to the quarantine, where they must stay the same from version to version.
    if not data:
        raise ValueError("empty: no bytes")
    if is_lfs_pointer(data):
        raise ValueError("a Git LFS pointer instead of the image: run git lfs pull where the images come from")
    opened = _open(data, name)
    refuse_bomb(opened, data)
    opened.load()  # before the EXIF tag is read, which would hide the error of a truncated file
    bits, white_is_zero = _declared_bits(data, opened), _is_white_zero(opened)
    image: Image.Image = _turn_upright(opened)
    del opened  # frees the pixels as they were stored, if the image was turned
    low_values = False
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        image, low_values = _keep_high_byte(image, bits, white_is_zero=white_is_zero)
    elif bits == 16:  # Pillow has kept the high byte
        low_values = _is_low(image)
        _keep_high_byte_of_transparent(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _composite_over_white(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
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


def refuse_bomb(opened: "Image.Image", data: bytes) -> None:
    """Raise an exception if an image, of which only the header has been read, would fill the memory or take minutes."""
    from PIL import Image

    num_pixels = opened.width * opened.height
    if num_pixels > MAX_PIXELS:  # in Pillow's words; its own bound can be changed by any library in the process
        raise Image.DecompressionBombError(
            f"Image size ({num_pixels} pixels) exceeds limit of {MAX_PIXELS} pixels, "
            "could be decompression bomb DOS attack."
        )
    # Each scan of a progressive JPEG may have a few bytes, and goes through all pixels. MPO is JPEG of several frames.
    if opened.format in ("JPEG", "MPO") and "progressive" in opened.info:
        if (num_scans := data.count(JPEG_SCAN)) * num_pixels > MAX_SCANNED_PIXELS:
            raise ValueError(f"found {num_scans:,} scans of {num_pixels:,} pixels, expected some ten scans")
    # Pillow copies the rest of a block behind each comment.
    if data[:2] in (b"P1", b"P2", b"P3") and (num_comments := data.count(b"#")) > MAX_COMMENTS:
        raise ValueError(f"found {num_comments:,} comments, expected at most {MAX_COMMENTS:,}")


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


def _is_white_zero(opened: "Image.Image") -> bool:
    """Return whether a TIFF file stores white as 0."""
    return opened.format == "TIFF" and opened.tag_v2.get(262) == 0  # type: ignore[attr-defined]


def _keep_high_byte_of_transparent(image: "Image.Image") -> None:
    """Reduce the transparent colour of a 16-bit RGB image to the high bytes, as Pillow reduces the pixels alone."""
    if image.mode == "RGB" and "transparency" in image.info:
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])


def _is_low(image: "Image.Image") -> bool:
    """Return whether all colours of an 8-bit image are below 16, the high byte of 4,096, and not all are 0."""
    highest = (int(np.asarray(image.getchannel(band)).max()) for band in image.getbands() if band not in "Aa")
    return 0 < max(highest) < 16


def _strips(image: "Image.Image") -> "Iterator[tuple[int, Image.Image]]":
    """Yield (first row, rows) of an image, of which conversions take little memory; the image itself if it is small."""
    height = max(1, STRIP_PIXELS // image.width)
    if height >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


def _join_strips(mode: str, size: tuple[int, int], strips: "Iterator[tuple[int, Image.Image]]") -> "Image.Image":
    """Return an image of strips that were converted; the strip itself if it is the only one."""
    from PIL import Image

    joined = None
    for top, strip in strips:
        if strip.size == size:
            return strip
        joined = joined or Image.new(mode, size)
        joined.paste(strip, (0, top))
    assert joined is not None, "an image has rows"
    return joined


def _composite_over_white(image: "Image.Image") -> "Image.Image":
    """Return an image with transparency over white, as RGB."""
    from PIL import Image

    def composite(strip: Image.Image) -> Image.Image:
        strip = strip.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB")

    return _join_strips("RGB", image.size, ((top, composite(strip)) for top, strip in _strips(image)))


def _keep_high_byte(
    image: "Image.Image", bits: int | None, *, white_is_zero: bool = False
) -> "tuple[Image.Image, bool]":
    """Convert 16-bit grey to 8 bits by its high byte. Pillow's own conversion clips at 255 instead of scaling.

    bits: as the file declares them; values of 12 bits keep their upper eight. white_is_zero: invert them, as Pillow
    does for 8 bits alone. A transparent value of the image becomes white. Also returns whether all values are below
    4,096, as of cameras with 10 or 12 bits, though the file declares no such number.
    """
    from PIL import Image

    ranges = [
        (values.min(), values.max(), values.dtype) for _, strip in _strips(image) for values in [np.asarray(strip)]
    ]
    lowest, highest, dtype = np.min([low for low, *_ in ranges]), np.max([high for _, high, _ in ranges]), ranges[0][2]
    if dtype.kind == "f" or lowest < 0 or highest > 0xFFFF:
        raise ValueError(
            f"found grey values of {dtype} from {lowest:g} to {highest:g}, expected 8 or 16 bits: "
            "which of them is white is not known"
        )
    shift = 4 if bits == 12 else 8
    is_low = shift == 8 and 0 < (0xFFFF - int(lowest) if white_is_zero else int(highest)) < 4096
    transparent = image.info.get("transparency")

    def shifted(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        high = (values.astype(np.uint32) >> shift).astype(np.uint8)
        high = 255 - high if white_is_zero else high
        if transparent is not None:  # of all 16 bits, so that it cannot be found among the high bytes
            high[values == transparent] = 255
        return Image.fromarray(high)

    return _join_strips("L", image.size, ((top, shifted(strip)) for top, strip in _strips(image))), is_low


def quarantine_reason(error: Exception) -> str:
    """Return an error as one line that is the same in every run, for the quarantine: no memory addresses."""
    text = " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"
