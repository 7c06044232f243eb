"""Samples of tar files: which names belong to one, and what is said about folders."""

import pytest
from pictures import encoded, square, value_of, write_tar

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source

PNG = [encoded(square(value)) for value in range(3)]


def source(path, **settings):
    return open_source(ImagesConfig(path=str(path), **settings))


@pytest.mark.parametrize(
    ("image", "label", "key"),
    [
        ("./cat/2.png", "cat/2.cls", "x.tar/./cat/2"),
        ("cat/2.png", "./cat/2.cls", "x.tar/cat/2"),
        ("2.png", "./2.json", "x.tar/2"),
    ],
)
def test_names_that_differ_by_their_start_alone_are_one_sample(tmp_path, image, label, key):
    content = b'{"label": "cat"}' if label.endswith("json") else b"cat"
    for files in ({image: PNG[2], label: content}, {label: content, image: PNG[2]}):
        write_tar(tmp_path / "x.tar", files)
        listing = source(tmp_path).listing()
        assert (listing.keys, listing.class_names) == ([key], ("cat",))
        assert [value_of(each) for each in source(tmp_path).read(listing.keys)] == [2]
        earlier = source(tmp_path, reading="earlier").listing()  # that of outputs which have latents without labels
        assert (earlier.keys, earlier.class_names) == ([key], ())


def test_samples_that_differ_by_their_start_remain_two_where_each_has_an_image(tmp_path):
    write_tar(tmp_path / "x.tar", {"./a.png": PNG[0], "./a.cls": b"0", "a.png": PNG[1], "a.cls": b"1"})
    listing = source(tmp_path).listing()
    assert (listing.keys, listing.labels.tolist()) == (["x.tar/./a", "x.tar/a"], [0, 1])
    write_tar(tmp_path / "x.tar", {"./a.png": PNG[0], "./a.cls": b"5", "a.cls": b"7"})
    assert source(tmp_path).listing().labels.tolist() == [5]


def test_a_tar_of_a_working_directory_has_the_keys_that_it_always_had(tmp_path):
    files = {"./b/2.png": PNG[2], "./b/2.cls": b"1", "./a.cls": b"0", "./a.png": PNG[0]}
    listing = source(write_tar(tmp_path / "x.tar", files)).listing()
    assert (listing.keys, listing.labels.tolist()) == (["x.tar/./b/2", "x.tar/./a"], [1, 0])


def test_folders_in_a_tar_are_said_to_be_no_classes(tmp_path):
    """Which the folders are that the same files have outside of it."""
    file = write_tar(tmp_path / "x.tar", {"cat/1.png": PNG[0], "cat/2.png": PNG[1], "./dog/1.png": PNG[2]})
    listing = source(file).listing()
    assert (listing.class_names, listing.keys) == ((), ["x.tar/cat/1", "x.tar/cat/2", "x.tar/./dog/1"])
    (note,) = listing.notes
    assert note.startswith("the images lie in 2 folders of tar files (cat, dog), which are not read as classes: labels")
    earlier = source(file, reading="earlier").listing()
    assert (earlier.digest, earlier.notes) == (listing.digest, ())
    write_tar(tmp_path / "set" / "cat.tar", {"cat/1.png": PNG[0]})
    write_tar(tmp_path / "set" / "dog.tar", {"dog/1.png": PNG[0]})
    assert source(tmp_path / "set").listing().notes == (note,)


@pytest.mark.parametrize(
    "files",
    [
        {"all/1.png": PNG[0], "all/2.png": PNG[1]},
        {"1.png": PNG[0], "all/2.png": PNG[1]},
        {"cat/1.png": PNG[0], "cat/1.cls": b"cat", "dog/1.png": PNG[1], "dog/1.cls": b"dog"},
    ],
)
def test_other_folders_in_a_tar_are_no_news(tmp_path, files):
    assert source(write_tar(tmp_path / "x.tar", files)).listing().notes == ()
