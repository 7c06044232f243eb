"""Classes that look alike remain different classes, and a line says so."""

import unicodedata

import pytest
from pictures import encoded, square, write

from pipelines.config.recipe import ImagesConfig
from pipelines.images.alike_classes import note_alike_classes
from pipelines.images.open import open_source

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["cat", " cat", "dog"], "2 of 3 classes differ from another one by .* alone ('cat' and ' cat'): if they"),
        (["cat", " cat", "cat\t", "dog", "dog "], "5 of 5 .* ('cat' and ' cat' and 'cat\\t'; 'dog' and 'dog '): "),
        ([COMPOSED, DECOMPOSED], r"2 of 2 .* ('caf\xe9' and 'cafe\u0301'): "),
        ([COMPOSED, COMPOSED + "\u3000"], f"2 of 2 .* ('{COMPOSED}' and '{COMPOSED}\\u3000'): "),
        ([*"abcd", *(f"{name} " for name in "abcd")], "8 of 8 .* ('a' and 'a '; 'b' and 'b '; 'c' and 'c '; ...): "),
    ],
)
def test_classes_that_look_alike_are_shown(names, found):
    (note,) = note_alike_classes(names)
    start, _, end = found.partition(" .* ")
    assert note.startswith(start) and end in note


def test_other_classes_are_not_mentioned():
    assert note_alike_classes([]) == note_alike_classes(["cat", "Cat", "cats", COMPOSED, "cafe", "1", "01"]) == ()


def test_labels_that_differ_by_blanks_remain_classes_and_are_noticed(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png", encoded(square(1)))
    (tmp_path / "labels.csv").write_text("file,label\na.png,cat\nb.png, cat\n")
    listing = open_source(ImagesConfig(path=str(tmp_path / "labels.csv"))).listing()
    assert (listing.class_names, listing.labels.tolist()) == ((" cat", "cat"), [1, 0])
    (note,) = listing.describe_classes()
    assert "(' cat' and 'cat')" in note and "correct the labels" in note


def test_folders_whose_names_unicode_spells_in_two_ways_are_noticed(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        write(tmp_path / name / "1.png", encoded(square(1)))
    if len([*tmp_path.iterdir()]) < 2:
        pytest.skip("the file system takes both names for one")
    listing = open_source(ImagesConfig(path=str(tmp_path))).listing()
    assert sorted(listing.class_names) == sorted((COMPOSED, DECOMPOSED))
    (note,) = listing.describe_classes()
    assert r"'caf\xe9'" in note and r"'cafe\u0301'" in note
