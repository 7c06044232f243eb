"""Splits by any usual name: the training split is used, and the others never become classes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, square, write, write_tar

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.images.splits import DEFAULT_SPLIT, split_of, splits_of_folders
from raydit.errors import InvalidInput

PNG = encoded(square(1))


def listed(folder, names, **settings):
    for name in names:
        write(folder / name, PNG)
    return open_source(ImagesConfig(path=str(folder), **settings)).listing()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("train_set", "test_set"),
        ("trainset", "testset"),
        ("TrainImages", "ValImages"),
        ("images_train", "images_val"),
        ("train2017", "val2017"),
        ("TRAIN DATA", "Held-Out"),
        ("training", "Unlabelled"),
        ("train", "unlabeled"),
        ("train", "unsup"),
        ("train", "extra"),
        ("train", "dev"),
        ("train", "holdout"),
        ("seg_train", "seg_test"),
        ("archive/train", "archive/test"),
    ],
)
def test_the_training_split_is_used_by_any_usual_name(tmp_path, train, test):
    names = [f"{train}/cat/a.png", f"{train}/dog/b.png", f"{test}/cat/c.png"]
    listing = listed(tmp_path, names)
    assert listing.keys == names[:2] and listing.class_names == ("cat", "dog")
    (note,) = listing.notes
    assert 'split "train" is used' in note and f"left out: {test.rpartition('/')[2]} (1)" in note


@pytest.mark.parametrize("folder", ["Training/{}", "archive/Training/{}", "{}/Training"])
def test_folders_without_images_are_named_beside_the_split(tmp_path, folder):
    names = [f"{folder.format('cat')}/a.png", f"{folder.format('dog')}/b.png"]
    tests = [name.replace("Training", "Testing") for name in names]
    empty = folder.format("bird").removesuffix("/Training")
    (tmp_path / empty).mkdir(parents=True)
    split, note = listed(tmp_path, [*names, *tests]).notes
    assert 'split "train" is used' in split
    assert note == f"1 folder contains no images and is not counted as a class ({empty})"


def test_a_split_is_chosen_by_any_of_its_spellings(tmp_path):
    names = ["Training/a/1.png", "Validation Set/a/2.png", "test-images/a/3.png", "Unlabelled/a/4.png"]
    for split, number in {"train": 0, "TRAINING": 0, "val": 1, "dev": 1, "testing": 2, "unsup": 3}.items():
        assert listed(tmp_path, names, split=split).keys == [names[number]]
    assert len(listed(tmp_path, names, split="all")) == 4
    with pytest.raises(ValueError, match="found 'none', expected one of the splits .*: test, train, unlabelled, valid"):
        listed(tmp_path, names, split="none")


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/1.png", "dog/1.png", "test/1.png"], ("cat", "dog", "test")),
        (["bus/1.png", "plane/1.png", "train/1.png"], ("bus", "plane", "train")),
        ([f"n{number}/1.png" for number in range(9)] + ["test/1.png", "train/1.png"], None),
        (["extra/1.png", "plain/1.png"], ("extra", "plain")),
        (["unlabelled/1.png"], ("unlabelled",)),
    ],
)
def test_classes_that_are_called_like_splits_stay_classes(tmp_path, names, classes):
    listing = listed(tmp_path, names)
    assert len(listing) == len(names) and listing.notes == ()
    assert listing.class_names == (classes or tuple(sorted(name.partition("/")[0] for name in names)))


def test_folders_beside_training_and_test_images_are_left_out(tmp_path):
    names = ["seg_pred/3.png", "seg_test/a/2.png", "seg_train/a/1.png", "seg_train/b/1.png"]
    listing = listed(tmp_path, names)
    assert listing.keys == names[2:] and listing.class_names == ("a", "b")
    assert "left out: seg_pred (1), seg_test (1)" in listing.notes[0]


def test_all_images_of_splits_with_and_without_class_folders_are_listed(tmp_path):
    names = ["test/2.png", "train/a/1.png"]
    assert listed(tmp_path, names).class_names == ("a",)
    listing = listed(tmp_path, names, split="all")
    assert listing.keys == names and listing.class_names == () and "no class folders" in listing.notes[0]


def test_splits_within_class_folders_are_splits_of_each_class(tmp_path):
    listing = listed(tmp_path, ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"])
    assert listing.keys == ["cat/train/1.png", "dog/train/3.png"] and listing.class_names == ("cat", "dog")


def test_split_names_of_earlier_releases_are_unchanged_and_further_ones_give_way(tmp_path):
    assert split_of("train/extra.parquet") == "train" and split_of("training_val.tar") == "validation"
    assert split_of("trainset-0.tar") == "train" and split_of("trainset-0.tar", earlier=True) is None
    assert splits_of_folders(["passenger_train", "eval"]) == {"passenger_train": None, "eval": "test"}
    names = ["Testing/a/2.png", "Training/a/1.png"]
    assert listed(tmp_path, names, reading="earlier").class_names == ("Testing", "Training")


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_files_of_other_splits_are_left_out_and_said_so(tmp_path, suffix):
    for name in ("trainset-0", "testset-0", "unlabelled-0"):
        if suffix == "tar":
            write_tar(tmp_path / f"{name}.tar", {"a.png": PNG})
        else:
            pq.write_table(pa.table({"image": [PNG]}), tmp_path / f"{name}.parquet")
    listing = open_source(ImagesConfig(path=str(tmp_path))).listing()
    assert [key.partition(".")[0] for key in listing.keys] == ["trainset-0"]
    assert "left out: test (1), unlabelled (1) files" in listing.notes[0]


def test_a_table_gives_the_wanted_split_by_a_column_or_by_folders(tmp_path):
    for name in ("train/a.png", "test/b.png"):
        write(tmp_path / "folders" / name, PNG)
        write(tmp_path / "column" / name[-5:], PNG)
    write(tmp_path / "folders" / "metadata.csv", b"file_name,label\ntrain/a.png,x\ntest/b.png,y\n")
    write(tmp_path / "column" / "metadata.csv", b"file_name,label,split\na.png,x,Train\nb.png,y,TEST\n")
    for kind, key in {"folders": "train/a.png", "column": "a.png"}.items():
        listing = open_source(ImagesConfig(path=str(tmp_path / kind))).listing()
        assert (listing.keys, listing.class_names) == ([key], ("x",)) and len(listing.notes) == 1
        assert len(open_source(ImagesConfig(path=str(tmp_path / kind), split="all")).listing()) == 2


def write_undivided(folder, layout):
    """Two images in no splits, and the path of the data set."""
    for name in ("a/1.png", "b/2.png"):
        write(folder / "images" / name, PNG)
    rows = pa.table({"image": [PNG, PNG], "label": ["a", "b"]})
    if layout == "csv":
        (folder / "images" / "rows.csv").write_text("file_name,label\na/1.png,a\nb/2.png,b\n")
    if layout == "parquet":
        pq.write_table(rows, folder / "rows.parquet")
    if layout == "tar":
        write_tar(folder / "rows.tar", {"1.png": PNG, "1.cls": b"0", "2.png": PNG, "2.cls": b"1"})
    if layout == "npz":
        np.savez(folder / "rows.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]))
    if layout == "saved":
        (folder / "saved").mkdir()
        with pa.ipc.new_stream(str(folder / "saved" / "rows.arrow"), rows.schema) as writer:
            writer.write_table(rows)
        (folder / "saved" / "state.json").write_text('{"_data_files": [{"filename": "rows.arrow"}], "_split": null}')
    paths = {"folder": folder / "images", "csv": folder / "images" / "rows.csv", "saved": folder / "saved"}
    return paths.get(layout, folder / f"rows.{layout}")


@pytest.mark.parametrize("layout", ["folder", "csv", "parquet", "tar", "npz", "saved", "digits"])
def test_another_split_of_images_without_splits_is_refused(tmp_path, layout):
    path = "digits" if layout == "digits" else str(write_undivided(tmp_path, layout))
    everything = open_source(ImagesConfig(path=path)).listing()
    for split in ("Training", "all"):
        assert open_source(ImagesConfig(path=path, split=split)).listing().digest == everything.digest
    for split in ("banana", "test"):
        with pytest.raises(InvalidInput, match=f"images.split: found '{split}', expected one of .*: no splits"):
            open_source(ImagesConfig(path=path, split=split)).listing()
        assert (
            open_source(ImagesConfig(path=path, split=split, reading="earlier")).listing().digest == everything.digest
        )


def test_a_file_that_is_called_after_its_split_may_be_asked_for_by_it(tmp_path):
    path = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": [PNG], "label": [0]}), path)
    for split in ("train", "test", "testing"):
        assert len(open_source(ImagesConfig(path=str(path), split=split)).listing()) == 1
    with pytest.raises(InvalidInput, match="found 'validation', expected one of .*: test"):
        open_source(ImagesConfig(path=str(path), split="validation")).listing()


CARD = """---
configs:
- config_name: fancy
  data_files:
  - {split: train, path: fancy/first.parquet}
  - {split: test, path: fancy/last.parquet}
- config_name: plain
  data_files: plain/train.parquet
---
"""


@pytest.mark.parametrize("names", [("first", "last"), ("train", "test")], ids=["card", "folders"])
def test_files_of_other_subsets_are_not_called_another_split(tmp_path, names):
    if "first" in names:
        (tmp_path / "README.md").write_text(CARD)
    for file in (*(f"fancy/{name}" for name in names), "plain/train"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [PNG], "label": [0]}), tmp_path / f"{file}.parquet")
    listing = open_source(ImagesConfig(path=str(tmp_path), subset="fancy", format="huggingface")).listing()
    assert [key.partition("#")[0] for key in listing.keys] == [f"fancy/{names[0]}.parquet"]
    subset, split = listing.notes
    assert subset == 'the subset "fancy" is used, which leaves out: plain (1) files'
    assert split.startswith('the split "train" is used: ') and "plain" not in split
    assert f"left out: {'fancy/last.parquet' if 'last' in names else 'test'} (1) files" in split


def test_a_missing_split_that_the_recipe_did_not_name_is_called_the_default(tmp_path):
    for split in ("test", "val"):
        write(tmp_path / split / "cat" / "a.png", PNG)
    path = str(tmp_path)
    with pytest.raises(
        InvalidInput, match=r"images.split: found 'train' \(the default\), expected one of .*: test, val"
    ):
        open_source(ImagesConfig(path=path)).listing()
    with pytest.raises(InvalidInput, match="images.split: found 'extra', expected one of"):
        open_source(ImagesConfig(path=path, split="extra")).listing()


def test_the_default_split_is_that_of_recipes():
    assert ImagesConfig(path="images").split == DEFAULT_SPLIT
