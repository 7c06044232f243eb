"""Sources of images list the same keys in the same order, and decode what is there, whatever its mode."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import ImagesConfig
from pipelines.images import decode, open_source

SHARED = Path(os.environ.get("RAYDIT_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
CIFAR10 = SHARED / "data" / "cifar10"


def source(path, **settings):
    return open_source(ImagesConfig(path=str(path), **settings))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def square(value: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pixel(data: bytes) -> tuple:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def huge_png() -> bytes:
    """A few bytes that promise 3.6 thousand million pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_the_digits_are_1797_in_ten_classes_with_stable_keys():
    listing = source("digits").listing()
    assert len(listing) == len(set(listing.keys)) == 1797
    assert (listing.keys[0], listing.keys[-1]) == ("digits#0000", "digits#1796")
    assert listing.class_names == tuple("0123456789")
    assert listing.labels[:10].tolist() == list(range(10))
    assert listing.digest == source("digits").listing().digest
    first, again = source("digits").read(["digits#0000", "digits#0000"])
    assert first.size == (8, 8) and first.tobytes() == again.tobytes()


def test_class_folders_are_classes_in_the_order_of_their_names(tmp_path):
    for place, name in enumerate(["zebra/b.png", "ant/deep/er/a.png", "ant/z.JPG", "zebra/a.webp"]):
        write(tmp_path / name, encoded(square(place)))
    write(tmp_path / "ant" / "notes.txt", b"no image")
    listing = source(tmp_path).listing()
    assert listing.keys == ["ant/deep/er/a.png", "ant/z.JPG", "zebra/a.webp", "zebra/b.png"]
    assert listing.class_names == ("ant", "zebra")
    assert listing.labels.tolist() == [0, 0, 1, 1]
    assert [image.getpixel((0, 0))[0] for image in source(tmp_path).read(listing.keys[::-1])] == [0, 3, 2, 1]


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.png", encoded(square(9)))
    listing = source(tmp_path).listing()
    assert (listing.keys, listing.class_names, listing.labels.tolist()) == (["a.png", "b.png"], (), [0, 0])


def test_class_folders_among_loose_images_are_refused(tmp_path):
    write(tmp_path / "cat" / "a.png", encoded(square(1)))
    write(tmp_path / "loose.png", encoded(square(1)))
    with pytest.raises(ValueError, match="holds class folders and loose images such as loose.png; .* Move the loose"):
        source(tmp_path).listing()


@pytest.mark.parametrize("kind", [None, "folder", "parquet"])
def test_an_empty_folder_is_refused(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"images.path: no .* in .*; expected"):
        source(tmp_path, format=kind).listing()


def test_what_is_not_there_or_no_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images.path: nothing at .*none; expected a folder"):
        source(tmp_path / "none")
    write(tmp_path / "a.zip", b"x")
    with pytest.raises(ValueError, match=r"found the file .*a.zip; expected a folder of images, a .parquet"):
        source(tmp_path / "a.zip")


def huggingface_table(values, labels, names=("cat", "dog")) -> pa.Table:
    images = pa.array([{"bytes": encoded(square(value)), "path": None} for value in values])
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)


def test_parquet_of_hugging_face_is_read_across_files_and_row_groups(tmp_path):
    pq.write_table(huggingface_table(range(5), [0, 1, 0, 1, 1]), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(huggingface_table(range(5, 8), [1, 1, 0]), tmp_path / "b.parquet")
    listing = source(tmp_path).listing()
    assert listing.keys[4:6] == ["a.parquet#0000004", "b.parquet#0000000"]
    assert listing.class_names == ("cat", "dog")
    assert listing.labels.tolist() == [0, 1, 0, 1, 1, 1, 1, 0]
    order = [7, 0, 4, 2, 3, 5, 1, 6]
    images = source(tmp_path).read([listing.keys[place] for place in order])
    assert [image.getpixel((0, 0))[0] for image in images] == order


def test_parquet_with_a_binary_column_has_numbers_for_class_names(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"jpg": [encoded(square(value)) for value in (3, 4)], "cls": [2, 0]}), file)
    listing = source(file).listing()
    assert (listing.keys, listing.class_names) == (["x.parquet#0000000", "x.parquet#0000001"], ("0", "1", "2"))
    assert [image.getpixel((0, 0))[0] for image in source(file).read(listing.keys)] == [3, 4]


def test_parquet_without_labels_has_no_classes_and_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [encoded(square(3))]}), tmp_path / "x.parquet")
    listing = source(tmp_path).listing()
    assert (listing.labels.tolist(), listing.class_names) == ([0], ())
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has the columns text \(string\); expected one of image, img, jpg, png"):
        source(tmp_path).listing()


@pytest.mark.parametrize("labels", [[1.5], [None], [-1], [10**6]])
def test_parquet_labels_that_are_no_class_numbers_are_refused(tmp_path, labels):
    pq.write_table(pa.table({"image": [encoded(square(3))], "label": labels}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: .*label.*expected integers"):
        source(tmp_path).listing()


def test_one_bad_cell_of_parquet_does_not_stop_the_others(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"text", None, encoded(square(4))]}), file)
    first, second, third = source(file).read(source(file).listing().keys)
    assert isinstance(first, Exception) and isinstance(second, Exception)
    assert third.getpixel((0, 0)) == (4, 4, 4)


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
def test_transparency_is_laid_over_white(alpha, expected):
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
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, exif=exif))), np.asarray(upright))


def test_broken_images_come_back_as_exceptions_and_stop_no_others(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    files = {"a.png": encoded(square(1)), "b.jpg": whole[: len(whole) // 2], "c.png": b"", "d.jpg": b"plain text"}
    files |= {"e.png": huge_png(), "f.png": encoded(Image.fromarray(noise))[:-200], "g.png": encoded(square(2))}
    for name, data in files.items():
        write(tmp_path / name, data)
    images = list(source(tmp_path).read(list(files)))
    assert [name for name, image in zip(files, images, strict=True) if isinstance(image, Exception)] == [*files][1:6]
    assert type(images[4]) is Image.DecompressionBombError
    assert (images[0].getpixel((0, 0))[0], images[6].getpixel((0, 0))[0]) == (1, 2)
    (gone,) = source(tmp_path).read(["gone.png"])
    assert isinstance(gone, FileNotFoundError)


def test_the_digest_changes_with_the_images_and_not_with_their_place_or_time(tmp_path):
    for place in ("first", "second"):
        for name in ("x/a.png", "y/b.png"):
            write(tmp_path / place / name, encoded(square(1)))
    digest = source(tmp_path / "first").listing().digest
    os.utime(tmp_path / "second" / "x" / "a.png", (1, 1))
    assert source(tmp_path / "second").listing().digest == digest
    digests = {digest}
    write(tmp_path / "first" / "x" / "c.png", encoded(square(1)))
    digests.add(source(tmp_path / "first").listing().digest)
    write(tmp_path / "first" / "x" / "c.png", encoded(square(1)) + b"longer")
    digests.add(source(tmp_path / "first").listing().digest)
    (tmp_path / "first" / "x").rename(tmp_path / "first" / "w")
    digests.add(source(tmp_path / "first").listing().digest)
    assert len(digests) == 4


def test_a_split_is_disjoint_complete_and_about_as_large_as_asked():
    listing = source("digits").listing()
    train, held_out = listing.split(0.2)
    assert sorted(train.keys + held_out.keys) == listing.keys
    assert 0.16 < len(held_out) / len(listing) < 0.24
    label_of = dict(zip(listing.keys, listing.labels, strict=True))
    for part in (train, held_out):
        assert [label_of[key] for key in part.keys] == part.labels.tolist()
    assert len(listing.split(0.0)[1]) == 0


def test_growth_moves_no_image_to_the_other_side_of_a_split(tmp_path):
    for index in range(0, 60, 2):
        write(tmp_path / f"{index:02d}.png", b"x")
    before = source(tmp_path).listing().split(0.4)
    for index in range(1, 60, 2):
        write(tmp_path / f"{index:02d}.png", b"x")
    for old, new in zip(before, source(tmp_path).listing().split(0.4), strict=True):
        assert old.keys and set(old.keys) < set(new.keys)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"CIFAR-10 is not at {CIFAR10}; set RAYDIT_SHARED")
def test_cifar10_is_listed_whole_and_read_at_both_ends():
    listing = source(CIFAR10).listing()
    assert len(listing) == len(set(listing.keys)) == 50_000
    assert listing.keys[0] == "train-00000-of-00005.parquet#0000000"
    assert listing.keys[-1] == "train-00004-of-00005.parquet#0009999"
    assert listing.class_names == tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
    assert np.bincount(listing.labels).tolist() == [5000] * 10
    images = source(CIFAR10).read([listing.keys[0], listing.keys[-1]])
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 2
