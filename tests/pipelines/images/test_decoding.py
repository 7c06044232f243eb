"""Images of every mode become RGB, and other data is refused with a message that never changes."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import broken_pictures, encoded, huge_png, noise, square
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.images.decoding import (
    FORMAT_OF_SUFFIX,
    JPEG_SCAN,
    LOW_VALUES,
    decode_image,
    is_image,
    quarantine_reason,
    refuse_bomb,
)


def pixel(data: bytes) -> tuple:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_images_of_every_mode_become_rgb():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encoded(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert pixel(encoded(palette)) == (10, 20, 30)
    assert pixel(encoded(Image.new("I;16", (2, 2), 0x8012))) == (0x80, 0x80, 0x80)
    assert pixel(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    red, green, blue = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 100), (128, 177)])
def test_transparency_is_composited_over_white(alpha, expected):
    for image in (Image.new("RGBA", (2, 2), (100, 100, 100, alpha)), Image.new("LA", (2, 2), (100, alpha))):
        assert pixel(encoded(image)) == (expected,) * 3


def test_a_transparent_palette_colour_becomes_white():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encoded(palette, transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_by_their_exif_tag(orientation):
    upright = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    turns = Image.Transpose
    stored_as = [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE]
    stored_as += [turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270]
    turn = stored_as[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(stored, exif=exif))), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(kind):
    values = np.array([[0x0000, 0x00FF], [0x8012, 0xFFFF]], np.uint16)
    image = decode_image(encoded(Image.fromarray(values), kind))
    assert np.asarray(image)[..., 0].tolist() == [[0x00, 0x00], [0x80, 0xFF]]


def test_16_bit_colour_keeps_its_high_byte():
    assert pixel(png_of_one_pixel((0x1234, 0x8080, 0xFF00))) == (0x12, 0x80, 0xFF)


def png_of_one_pixel(colour: tuple[int, int, int], *chunks: bytes) -> bytes:
    """A PNG of one pixel with 16 bits a channel, which Pillow cannot write, and further chunks."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    content = b"IDAT" + zlib.compress(b"\0" + struct.pack(">HHH", *colour))
    framed = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, *chunks, content, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)])
def test_grey_without_a_known_white_is_refused(values):
    with pytest.raises(ValueError, match=r"found grey values of (float32|int32) from .* expected 8 or 16 bits"):
        decode_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_lossless_formats_decode_to_the_same_pixels(kind):
    pixels = np.random.default_rng(0).integers(0, 4, (8, 9, 3), dtype=np.uint8) * 80
    image = Image.fromarray(pixels)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = image.quantize(64) if kind == "GIF" else image
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(image, kind, **options))), pixels)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("AVIF", {"quality": 95}), ("JPEG2000", {})])
def test_lossy_formats_decode_to_nearly_the_same_pixels(kind, options):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(100)), axis=2)
    found = np.asarray(decode_image(encoded(Image.fromarray(pixels), kind, **options)))
    assert found.shape == pixels.shape and np.abs(found.astype(int) - pixels).mean() < 3


def test_cmyk_in_jpeg_is_inverted_with_adobes_mark_and_without():
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    start = cmyk.index(b"\xff\xee")
    length = int.from_bytes(cmyk[start + 2 : start + 4], "big")
    for data in (cmyk, cmyk[:start] + cmyk[start + 2 + length :]):
        red, green, blue = pixel(data)
        assert red > 250 and green < 5 and blue < 5


def test_half_transparent_colours_are_blended_with_white_in_every_mode():
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 100])
    assert pixel(encoded(palette, transparency=bytes([51]))) == (244, 204, 224)  # a fifth of the colour
    assert pixel(encoded(Image.new("RGBA", (2, 2), (200, 0, 100, 51)), "WEBP", lossless=True)) == (244, 204, 224)
    assert pixel(encoded(Image.new("RGB", (2, 2), (200, 0, 100)), transparency=(200, 0, 100))) == (255, 255, 255)
    assert pixel(encoded(Image.new("L", (2, 2), 9), transparency=9)) == (255, 255, 255)
    assert pixel(encoded(Image.fromarray(np.full((2, 2), 9 << 8, np.uint16)))) == (9, 9, 9)


def test_the_first_of_several_frames_is_used():
    frames = [square(value).quantize() for value in (50, 100)]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (50, 50, 50)


def test_a_broken_exif_tag_does_not_spoil_the_image():
    intact = encoded(Image.fromarray(np.repeat([[10, 200]], 8, axis=0).repeat(8, axis=1).astype(np.uint8)), "JPEG")
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    text_for_a_number = struct.pack(">HHI4s", 0x011B, 2, 4, b"abc")
    tags = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turned + text_for_a_number + bytes(4)
    data = intact[:2] + b"\xff\xe1" + struct.pack(">H", len(tags) + 2) + tags + intact[2:]
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode_image(data)
    assert image.size == (8, 16) and image.getpixel((4, 2))[0] < 20 and image.getpixel((4, 13))[0] > 190


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_truncated_image_is_refused(kind):
    intact = noise(kind)
    for kept in (len(intact) // 2, len(intact) - 50):
        with pytest.raises(Exception) as caught:
            decode_image(intact[:kept])
        assert "0x" not in quarantine_reason(caught.value)


def test_reasons_are_the_same_in_every_run():
    code = (
        "from pictures import broken_pictures; from pipelines.images.decoding import decode_image, quarantine_reason\n"
        "for data in broken_pictures():\n"
        "    try: decode_image(data)\n"
        "    except Exception as error: print(quarantine_reason(error))\n"
    )
    folders = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    outputs = set()
    for seed in "01":
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": folders}
        outputs.add(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
        )
    (output,) = outputs
    assert output.splitlines()[1:3] == [
        "ValueError: empty: no bytes",
        "UnidentifiedImageError: no image format known here: 10 bytes from b'plain te'",
    ]
    assert len(output.splitlines()) == len(broken_pictures())


def test_a_reason_is_one_short_line_without_addresses():
    error = OSError("cannot read <object at 0x7f81c0a2>:\n  " + "x" * 1000)
    assert (
        quarantine_reason(error).startswith("OSError: cannot read <object at 0x...>: xxx")
        and len(quarantine_reason(error)) < 320
    )


def test_a_decompression_bomb_is_refused_before_it_is_decompressed():
    with pytest.raises(Image.DecompressionBombError, match="3600000000 pixels"):
        decode_image(huge_png())


def test_formats_that_start_programs_are_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(UnidentifiedImageError, match="no image format known here"):
        decode_image(postscript)


@pytest.mark.parametrize(("name", "shown"), [("a.JPG", True), ("a.b.tiff", True), ("a.txt", False), ("png", False)])
def test_images_are_recognised_by_their_suffix(name, shown):
    assert is_image(name) is shown


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "JPEG"])
@pytest.mark.parametrize("broken", [b"garbage!", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"])
def test_broken_exif_leaves_the_pixels_of_any_format_as_they_are(kind, broken):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    picture = Image.fromarray(np.repeat([[10, 200]], 8, axis=0).repeat(8, axis=1).astype(np.uint8)).convert("RGB")
    intact = Image.Exif()
    intact[0x010E] = "x" * 40
    tags = intact.tobytes().removeprefix(b"Exif\0\0")
    data = encoded(picture, kind, exif=tags if kind == "AVIF" else intact)
    start = data.index(tags)
    spoiled = data[:start] + broken + data[start + len(broken) :]
    if kind == "PNG":  # whose chunk holds a checksum
        chunk = spoiled.index(b"eXIf")
        end = chunk + 4 + int.from_bytes(spoiled[chunk - 4 : chunk], "big")
        spoiled = spoiled[:end] + struct.pack(">I", zlib.crc32(spoiled[chunk:end])) + spoiled[end + 4 :]
    found = decode_image(spoiled)
    assert found.size == (16, 8)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(decode_image(data)))


@pytest.mark.parametrize(("suffix", "kind"), FORMAT_OF_SUFFIX.items())
def test_formats_without_a_mark_are_decoded_by_their_suffix_alone(suffix, kind):
    data = encoded(square(9), kind)
    assert decode_image(data, f"a/b{suffix.upper()}").getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(UnidentifiedImageError, match="no image format known here"):
        decode_image(data, "a.png")
    with pytest.raises(UnidentifiedImageError, match="10 bytes from b'plain te'"):
        decode_image(b"plain text", f"a{suffix}")


def test_12_bit_tiff_is_scaled_and_low_values_in_16_bits_are_marked():
    values = np.array([[0, 100], [4000, 4095]], np.uint16)
    packed = bytes.fromhex("000064") + bytes.fromhex("fa0fff")
    tags = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 6)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    twelve = decode_image(b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", 9) + entries + bytes(4))
    assert np.asarray(twelve)[..., 0].tolist() == [[0, 6], [250, 255]] and not twelve.info[LOW_VALUES]
    low = decode_image(encoded(Image.fromarray(values)))
    assert np.asarray(low)[..., 0].tolist() == [[0, 0], [15, 15]] and low.info[LOW_VALUES]
    for dark in (encoded(Image.fromarray(values * 0)), encoded(Image.fromarray(values + 1)), encoded(square(3))):
        assert not decode_image(dark).info[LOW_VALUES]


def test_a_git_lfs_pointer_in_place_of_an_image_says_what_it_is():
    with pytest.raises(ValueError, match="a Git LFS pointer instead of the image: run git lfs pull"):
        decode_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")


@pytest.mark.parametrize("name", ["a.jpe", "a.TGA", "a.pnm", "a.pbm", "a.jfif", "a.jxl", "a.heif", "a.qoi"])
def test_images_of_rarer_suffixes_are_listed(name):
    assert is_image(name) and is_image(name, earlier=True) is name.endswith("jfif")


def test_large_images_are_converted_in_strips_to_the_same_pixels():
    values = np.random.default_rng(0).integers(0, 256, (3, 3, 4), dtype=np.uint8)
    few_rows = Image.fromarray(values).resize((2000, 9), Image.Resampling.BICUBIC)
    many_rows = few_rows.resize((2000, 5000), Image.Resampling.NEAREST)  # three strips
    grey = Image.fromarray(np.asarray(many_rows)[..., 0].astype(np.uint16) * 200)
    for large in (many_rows, many_rows.quantize(32, method=Image.Quantize.FASTOCTREE)):
        flat = Image.alpha_composite(Image.new("RGBA", large.size, "white"), large.convert("RGBA")).convert("RGB")
        assert decode_image(encoded(large, compress_level=1)).tobytes() == flat.tobytes()
    high_byte = np.asarray(decode_image(encoded(grey, compress_level=1)))
    assert np.array_equal(high_byte[..., 0], np.asarray(grey) >> 8)


def with_white_is_zero(tiff: bytes) -> bytes:
    """A little-endian TIFF file whose tag 262 (PhotometricInterpretation) is 0; Pillow writes only 1."""
    tag = struct.pack("<HHI", 262, 3, 1)
    at = tiff.index(tag) + len(tag)
    return tiff[:at] + struct.pack("<H", 0) + tiff[at + 2 :]


def test_16_bit_grey_whose_white_is_zero_is_inverted_like_8_bit_grey():
    high = np.array([[0, 1, 128], [200, 254, 255]], np.uint8)
    found = [
        np.asarray(decode_image(with_white_is_zero(encoded(Image.fromarray(values), "TIFF"))))[..., 0]
        for values in (high, high.astype(np.uint16) << 8 | 0x12)
    ]
    assert found[0].tolist() == found[1].tolist() == (255 - high).tolist()


def test_low_values_are_those_after_inversion():
    for values, is_low in ((np.full((2, 2), 0xFFFF - 3000, np.uint16), True), (np.full((2, 2), 9, np.uint16), False)):
        assert decode_image(with_white_is_zero(encoded(Image.fromarray(values), "TIFF"))).info[LOW_VALUES] == is_low


def test_the_transparent_value_of_16_bit_grey_becomes_white_like_that_of_8_bit_grey():
    high = np.array([[0, 200], [9, 100]], np.uint8)
    for transparent in (0, 9, 200):
        expected = np.where(high == transparent, 255, high).tolist()
        wide = Image.fromarray(high.astype(np.uint16) << 8)
        assert (
            np.asarray(decode_image(encoded(Image.fromarray(high), transparency=transparent)))[..., 0].tolist()
            == expected
        )
        assert np.asarray(decode_image(encoded(wide, transparency=transparent << 8)))[..., 0].tolist() == expected
    close = Image.fromarray(np.array([[0x1234, 0x1235]], np.uint16))  # one value is transparent, and not its neighbour
    assert np.asarray(decode_image(encoded(close, transparency=0x1234)))[0, :, 0].tolist() == [255, 0x12]


@pytest.mark.parametrize("transparent", [(0x1234, 0x8080, 0xFF00), (0, 0, 0)])
def test_the_transparent_colour_of_16_bit_rgb_becomes_white(transparent):
    colour = (0x1234, 0x8080, 0xFF00)
    data = png_of_one_pixel(colour, b"tRNS" + struct.pack(">HHH", *transparent))
    assert pixel(data) == ((255, 255, 255) if transparent == colour else (0x12, 0x80, 0xFF))


def test_scans_are_counted_in_jpegs_of_several_frames_too():
    data = encoded(square(9, 16), "MPO", save_all=True, append_images=[square(9, 16)], progressive=True)
    opened = Image.open(io.BytesIO(data))
    assert opened.format == "MPO" and opened.info["progressive"]
    opened._size = (13_000, 13_000)  # as a header declares it, without the time to decode so many pixels
    refuse_bomb(opened, data)
    with pytest.raises(ValueError, match="scans of 169,000,000 pixels, expected some ten scans"):
        refuse_bomb(opened, data + JPEG_SCAN * 1000)
