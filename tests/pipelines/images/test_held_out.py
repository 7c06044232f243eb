"""Images of some classes, and held-out images that are not a share of the training images."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, square
from PIL import Image
from tiny import write_images

from pipelines.config.recipe import ImagesConfig
from pipelines.images.decoding import is_image
from pipelines.images.held_out import split_images
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.images.preprocess import read_cropped
from pipelines.images.validation import held_out_source, names_split
from raydit.errors import InvalidInput, NotFound


@pytest.fixture
def images(tmp_path):
    return ImagesConfig(path=str(write_images(tmp_path / "images", per_class=4)), size=16)


def listed(images):
    return open_source(images).listing()


def halves(images):
    return split_images(images, listed(images))


def names(listing):
    return [listing.class_names[label] for label in listing.labels]


def test_classes_keep_their_order_and_are_numbered_among_themselves(images):
    everything, some = listed(images), listed(replace(images, classes=("stripe", "blob")))
    assert some.class_names == ("blob", "stripe") and sorted(set(some.labels.tolist())) == [0, 1]
    kept = [name != "ring" for name in names(everything)]
    expected = everything.take(np.array(kept))
    assert some.keys == expected.keys and names(some) == names(expected)
    np.testing.assert_array_equal(some.stamps, expected.stamps)


def test_both_halves_have_the_classes_only(images):
    training, held_out = halves(replace(images, classes=("ring", "stripe"), held_out=0.4))
    assert training.class_names == held_out.class_names == ("ring", "stripe")
    assert len(training) + len(held_out) == 8 and len(held_out)


def test_images_of_some_classes_are_read_as_without_the_field(images):
    some = replace(images, classes=("ring",))
    keys = listed(some).keys
    np.testing.assert_array_equal(read_cropped(some, keys)[0], read_cropped(images, keys)[0])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("rings",), r"images.classes: found 'rings' \(did you mean \"ring\"\?\), expected .*blob, ring, stripe"),
        (("blob", "zzz"), "images.classes: found 'zzz', expected names of classes: blob"),
    ],
)
def test_an_unknown_class_is_refused(images, classes, message):
    with pytest.raises(InvalidInput, match=message):
        listed(replace(images, classes=classes))


def test_classes_of_images_without_classes_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(InvalidInput, match="images.classes: found blob for images without classes"):
        listed(ImagesConfig(path=str(tmp_path), classes=("blob",)))


def test_a_class_named_twice_and_two_sources_of_held_out_images_are_refused():
    with pytest.raises(InvalidInput, match="classes: found 'a' more than once"):
        ImagesConfig(path="p", classes=("a", "b", "a"))
    with pytest.raises(InvalidInput, match="validation: found 'test' with held_out = 0.1"):
        ImagesConfig(path="p", validation="test", held_out=0.1)


def test_validation_by_path_gives_all_its_images_in_the_classes_of_training(images, tmp_path):
    other = write_images(tmp_path / "other", per_class=2)
    for file in (other / "blob").iterdir():
        file.unlink()  # so that the other images alone would number their classes otherwise
    (other / "blob").rmdir()
    images = replace(images, validation=str(other))
    training, held_out = halves(images)
    assert training.digest == listed(replace(images, validation=None)).digest
    assert held_out.class_names == training.class_names == ("blob", "ring", "stripe")
    assert [key.partition("/")[0] for key in held_out.keys] == names(held_out) and set(held_out.labels) == {1, 2}
    pixels = read_cropped(held_out_source(images), held_out.keys).images
    np.testing.assert_array_equal(pixels, read_cropped(ImagesConfig(path=str(other), size=16), held_out.keys).images)
    assert (pixels != read_cropped(images, held_out.keys).images).any()  # other images have the same keys


def test_validation_by_split_and_by_classes(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        write_images(tmp_path / split, per_class=count)
    images = ImagesConfig(path=str(tmp_path), size=16, validation="test", classes=("stripe", "ring"))
    training, held_out = halves(images)
    assert {key.partition("/")[0] for key in training.keys} == {"train"} and len(training) == 8
    assert {key.partition("/")[0] for key in held_out.keys} == {"test"} and len(held_out) == 4
    assert held_out.class_names == training.class_names == ("ring", "stripe")
    assert [key.split("/")[1] for key in held_out.keys] == names(held_out)
    assert len(read_cropped(held_out_source(images), held_out.keys)[0]) == 4
    with pytest.raises(
        InvalidInput, match="images.validation: found 'validation', expected one of the splits of .*test"
    ):
        halves(replace(images, validation="validation"))


def test_validation_of_parquet_files_matches_classes_by_name(tmp_path):
    data = [path for path in write_images(tmp_path / "images", per_class=2).rglob("*.png") if "broken" not in path.name]
    assert all(is_image(path.name) for path in data)
    for split, order in (("train", sorted(data)), ("test", sorted(data)[::-1][:3])):
        rows = {"image": [path.read_bytes() for path in order], "label": [path.parent.name for path in order]}
        pq.write_table(pa.table(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    training, held_out = halves(ImagesConfig(path=str(tmp_path), format="parquet", validation="test"))
    assert training.class_names == held_out.class_names == ("blob", "ring", "stripe")
    assert names(held_out) == ["stripe", "stripe", "ring"]


def refused(images, message, error=InvalidInput, **changes):
    with pytest.raises(error, match=message):
        halves(replace(images, **changes))


def test_validation_that_does_not_fit_is_refused(images, tmp_path):
    other = write_images(tmp_path / "other", per_class=2)
    (other / "ring").rename(other / "square")
    refused(images, "images.validation: found the class 'square', expected .*blob, ring", validation=str(other))
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "a.png")
    refused(images, "images.validation: found images without classes", validation=str(plain))
    refused(images, "images.validation: found nothing at ", NotFound, validation=str(tmp_path / "nowhere"))
    for same in (images.path, f"{images.path}/", "train"):
        refused(images, "which names the training images", validation=same)
    refused(ImagesConfig(path="digits"), "images.validation: found 'test', expected .*: no splits", validation="test")
    refused(ImagesConfig(path="digits"), "which names the training images", validation="digits")
    refused(images, "which names the training images", split="all", validation="test")


def test_images_without_classes_have_held_out_images_without_classes(images, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "a.png")
    _, held_out = halves(ImagesConfig(path=str(plain), validation=images.path))
    assert held_out.class_names == () and len(held_out) == 13 and not held_out.labels.any()


def test_a_word_for_a_split_is_never_a_folder_that_happens_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("test", "other"):
        (tmp_path / name).mkdir()
    assert [names_split(name) for name in ("test", "val", "fold2", "other", "./test", "OWNER/NAME", "s3://b/p")] == [
        *(True, True, True, False, False, False, False)
    ]
    images = ImagesConfig(path="other", validation="./test")
    assert with_absolute_paths(images).validation == str(tmp_path / "test")
    assert with_absolute_paths(replace(images, validation="test")).validation == "test"


@pytest.mark.parametrize("reading", [None, "earlier"])
def test_a_split_that_is_not_there_never_holds_out_training_images(images, reading):
    some = replace(images, classes=("blob", "ring"), reading=reading)
    message = "found 'test', expected one of .*: no splits" if reading is None else "which names the training images"
    refused(some, f"images.validation: {message}" if reading is None else message, validation="test")
    refused(images, message, validation="test", reading=reading)


def write_splits(folder):
    for split, count in (("train", 4), ("test", 2)):
        write_images(folder / split, per_class=count)
    return folder


@pytest.mark.parametrize("inside", ["train", "train/ring"])
def test_folders_around_training_images_are_refused(tmp_path, inside):
    root = write_splits(tmp_path / "data")
    images = ImagesConfig(path=str(root / inside), size=16, format="folder")
    (tmp_path / "link").symlink_to(root)
    for around in (root, tmp_path / "link"):
        refused(images, "of whose [0-9]+ images [0-9]+ are trained on, such as train/", validation=str(around))


def test_folders_inside_the_training_images_are_refused_where_they_are_trained_on(tmp_path):
    root = write_splits(tmp_path / "data")
    images = ImagesConfig(path=str(root), size=16)
    for classes in ((), ("ring",)):
        refused(images, "which names the training images", validation=str(root / "train"), classes=classes)
    training, held_out = halves(replace(images, validation=str(root / "test")))
    assert (len(training), len(held_out)) == (13, 7)
    assert {key.partition("/")[0] for key in training.keys} == {"train"}


def test_copies_of_all_training_images_are_refused_also_of_some_classes(images, tmp_path):
    copy = shutil.copytree(images.path, tmp_path / "copy")
    for classes in ((), ("ring",)):
        refused(images, "which names the training images", validation=str(copy), classes=classes)


def test_equal_names_in_the_folders_of_two_saved_splits_are_other_images(tmp_path):
    """save_to_disk gives the files of every split the same names."""
    splits = {"train": [10, 20], "test": [30, 40]}
    for split, values in splits.items():
        rows = {"image": [{"bytes": encoded(square(value))} for value in values]}
        table = pa.table({**rows, "label": ["a", "b"]})
        (tmp_path / split).mkdir()
        with pa.ipc.new_stream(str(tmp_path / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    training, held_out = halves(ImagesConfig(path=str(tmp_path), size=16, validation="test"))
    assert training.keys == held_out.keys and len(held_out) == 2


def write_bitmaps(folder, offset):
    """Files whose lengths follow from their size, named as in any other folder of this kind."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for index in range(5):
            Image.fromarray(np.full((8, 8, 3), 10 * index + offset, np.uint8)).save(folder / name / f"{index}.bmp")
    return str(folder)


def test_equal_names_and_lengths_of_other_pixels_are_other_images(tmp_path):
    images = ImagesConfig(path=write_bitmaps(tmp_path / "train", 0), size=8)
    other, copy = write_bitmaps(tmp_path / "test", 5), write_bitmaps(tmp_path / "copy", 0)
    training, held_out = halves(replace(images, validation=other))
    assert training.digest == held_out.digest and len(held_out) == 10
    refused(images, "which names the training images", validation=copy)
    for file in (tmp_path / "copy").rglob("*.bmp"):
        file.write_bytes(b"x" * file.stat().st_size)  # nothing to compare
    refused(images, "which names the training images", validation=copy)
