"""Sources are recognised or refused, and listings keep their digests and splits."""

import os
import tracemalloc
from typing import get_args, get_type_hints

import numpy as np
import pytest
from pictures import encoded, huge_png, square, write
from PIL import Image

from pipelines.config.recipe import ImagesConfig
from pipelines.images.listing import Listing
from pipelines.images.open import FORMATS, open_source


def source(path, **settings):
    return open_source(ImagesConfig(path=str(path), **settings))


def test_every_format_of_a_recipe_can_be_opened():
    choice, _ = get_args(get_type_hints(ImagesConfig)["format"])
    assert {*get_args(choice)} == {*FORMATS, "digits"} - {"npz"}


def test_the_digits_are_1797_in_ten_classes_with_stable_keys():
    listing = source("digits").listing()
    assert len(listing) == len(set(listing.keys)) == 1797
    assert (listing.keys[0], listing.keys[-1]) == ("digits#0000", "digits#1796")
    assert listing.class_names == tuple("0123456789")
    assert listing.labels[:10].tolist() == list(range(10))
    assert listing.digest == source("digits").listing().digest
    first, again = source("digits").read(["digits#0000", "digits#0000"])
    assert first.size == (8, 8) and first.tobytes() == again.tobytes()


def test_the_digits_can_have_names_and_have_no_columns():
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    listing = source("digits", class_names=names, label_column="kind").listing()
    assert listing.class_names == names and listing.labels[:10].tolist() == list(range(10))
    assert listing.notes == (
        "images.label_column = 'kind' is of no effect, because scikit-learn's digits have no columns",
    )
    for wrong in (("a", "b"), ("zero",) * 10, (*names, "ten")):
        with pytest.raises(ValueError, match="images.class_names: found .*, expected 10 different names"):
            source("digits", class_names=wrong).listing()
    # An output that an earlier release made with names goes on without them.
    assert source("digits", class_names=("a", "b"), reading="earlier").listing().class_names == tuple("0123456789")


@pytest.mark.parametrize("kind", [None, "folder", "parquet"])
def test_an_empty_folder_is_refused(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"images.path: found no .* in .*, expected"):
        source(tmp_path, format=kind).listing()


def test_missing_paths_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images.path: found nothing at .*none, expected a folder"):
        source(tmp_path / "none")
    write(tmp_path / "a.zip", b"x")
    with pytest.raises(ValueError, match=r"found the file .*a.zip, expected a folder of images, a .parquet"):
        source(tmp_path / "a.zip")


def test_broken_images_are_yielded_as_exceptions_and_do_not_stop_the_others(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    intact = encoded(Image.fromarray(noise), "JPEG")
    files = {"a.png": encoded(square(1)), "b.jpg": intact[: len(intact) // 2], "c.png": b"", "d.jpg": b"plain text"}
    files |= {"e.png": huge_png(), "f.png": encoded(Image.fromarray(noise))[:-200], "g.png": encoded(square(2))}
    for name, data in files.items():
        write(tmp_path / name, data)
    images = list(source(tmp_path).read(list(files)))
    assert [name for name, image in zip(files, images, strict=True) if isinstance(image, Exception)] == [*files][1:6]
    assert type(images[4]) is Image.DecompressionBombError
    assert (images[0].getpixel((0, 0))[0], images[6].getpixel((0, 0))[0]) == (1, 2)
    (gone,) = source(tmp_path).read(["gone.png"])
    assert isinstance(gone, FileNotFoundError)


def test_the_digest_changes_with_the_images_but_not_with_folder_or_time(tmp_path):
    for folder in ("first", "second"):
        for name in ("x/a.png", "y/b.png"):
            write(tmp_path / folder / name, encoded(square(1)))
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


def test_a_split_is_disjoint_complete_and_about_as_large_as_requested():
    listing = source("digits").listing()
    train, held_out = listing.split(0.2)
    assert sorted(train.keys + held_out.keys) == listing.keys
    assert 0.16 < len(held_out) / len(listing) < 0.24
    label_of = dict(zip(listing.keys, listing.labels, strict=True))
    for part in (train, held_out):
        assert [label_of[key] for key in part.keys] == part.labels.tolist()
    assert len(listing.split(0.0)[1]) == 0


def test_added_images_do_not_move_others_across_a_split(tmp_path):
    for index in range(0, 60, 2):
        write(tmp_path / f"{index:02d}.png", b"x")
    before = source(tmp_path).listing().split(0.4)
    for index in range(1, 60, 2):
        write(tmp_path / f"{index:02d}.png", b"x")
    for old, new in zip(before, source(tmp_path).listing().split(0.4), strict=True):
        assert old.keys and set(old.keys) < set(new.keys)


def test_a_text_as_the_name_of_a_class_is_refused(tmp_path):
    """A column of captions, or a megabyte that somebody put there."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,label\na.png,{'very ' * 1000}long\n")
    with pytest.raises(ValueError, match="found a class name of 5,004 characters, 'very very .*label_column"):
        open_source(ImagesConfig(path=str(tmp_path))).listing()


def test_the_listing_of_a_few_images_needs_no_array_of_all():
    """Each shard of a plan is such a listing, so planning would take time with the square of the number of images."""
    labels = np.arange(1_000_000, dtype=np.int32)
    images = Listing(["a", "b"] * 500_000, labels, np.zeros(1_000_000, np.int64), ())
    tracemalloc.start()
    few = images.take(range(3, 6))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (few.keys, few.labels.tolist()) == (["b", "a", "b"], [3, 4, 5])
    assert peak < 100_000
    assert images.take(labels > 999_997).labels.tolist() == [999_998, 999_999]
    assert len(images.take([])) == 0
