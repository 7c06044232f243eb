"""Labels stored as text: whole numbers in their usual spelling are numbers; all else are names as they are written."""

import pytest
from pictures import encoded, square, write

from pipelines.config.recipe import ImagesConfig
from pipelines.images.labels import parse_labels
from pipelines.images.open import open_source

SPELLINGS = {
    "padded": (["01", "1", "001"], ("001", "01", "1"), [1, 2, 0]),
    "exponents": (["1e3", "1000", "5e2"], ("1000", "1e3", "5e2"), [1, 0, 2]),
    "infinite": (["1e3", "9e999", "2e3"], ("1e3", "2e3", "9e999"), [0, 2, 1]),
    "hexadecimal": (["0x10", "16", "7"], ("0x10", "16", "7"), [0, 1, 2]),
    "too long": (["7", "9" * 20, "8"], ("7", "8", "9" * 20), [0, 2, 1]),
    "truth values": (["true", "false", "true"], ("false", "true"), [1, 0, 1]),
    "dates": (["2021-01-01", "2020-01-01", "2021-01-01"], ("2020-01-01", "2021-01-01"), [1, 0, 1]),
    "times": (["00:20:00", "00:10:00", "00:20:00"], ("00:10:00", "00:20:00"), [1, 0, 1]),
    "numbers": (["2", "0", "10"], tuple(map(str, range(11))), [2, 0, 10]),
    "whole fractions": (["2.0", "0.0", "3.0"], ("0", "1", "2", "3"), [2, 0, 3]),
    "spaces": ([" 2", "0 ", "1"], ("0", "1", "2"), [2, 0, 1]),
}


def list_labels(folder, labels, text, **settings):
    for name in ("a.png", "b.png", "c.png")[: len(labels)]:
        write(folder / name, encoded(square(1)))
    write(folder / "labels.csv", text.encode())
    return open_source(ImagesConfig(path=str(folder / "labels.csv"), **settings)).listing()


def as_csv(labels):
    return "file,label\n" + "".join(f"{name}.png,{label}\n" for name, label in zip("abc", labels, strict=False))


@pytest.mark.parametrize(("labels", "class_names", "numbers"), SPELLINGS.values(), ids=SPELLINGS)
def test_labels_of_a_csv_file_keep_their_spelling(tmp_path, labels, class_names, numbers):
    listing = list_labels(tmp_path, labels, as_csv(labels))
    assert (listing.class_names, listing.labels.tolist()) == (class_names, numbers)


def test_an_output_of_an_earlier_release_keeps_the_numbers_of_its_labels(tmp_path):
    labels = ["01", "1e0", "2"]
    listing = list_labels(tmp_path, labels, as_csv(labels), reading="earlier")
    assert (listing.class_names, listing.labels.tolist()) == (("0", "1", "2"), [1, 1, 2])


def test_padded_numbers_are_positions_among_class_names_of_other_words(tmp_path):
    labels = ["02", "00", "01"]
    words = list_labels(tmp_path, labels, as_csv(labels), class_names=("x", "y", "z"))
    assert (words.class_names, words.labels.tolist()) == (("x", "y", "z"), [2, 0, 1])
    padded = list_labels(tmp_path, labels, as_csv(labels), class_names=("01", "00", "02"))
    assert (padded.class_names, padded.labels.tolist()) == (("01", "00", "02"), [2, 1, 0])


@pytest.mark.parametrize("labels", [["1", "NA", "2"], ["01", "", "2"], ["1.5", "2.0", "1e3"]])
def test_missing_labels_and_fractions_are_no_names(tmp_path, labels):
    with pytest.raises(ValueError, match=r"found no label|found the label 1\.5 of type double"):
        list_labels(tmp_path, labels, as_csv(labels))


def test_dates_in_json_lines_are_names(tmp_path):
    rows = [f'{{"file": "{name}.png", "label": "202{name == "a":d}-01-01"}}\n' for name in "ab"]
    for name in "ab":
        write(tmp_path / f"{name}.png", encoded(square(1)))
    write(tmp_path / "labels.jsonl", "".join(rows).encode())
    listing = open_source(ImagesConfig(path=str(tmp_path))).listing()
    assert (listing.class_names, listing.labels.tolist()) == (("2020-01-01", "2021-01-01"), [1, 0])


def test_labels_of_tar_files_are_numbers_only_in_their_usual_spelling():
    assert parse_labels(["0", "12", "-3"]).to_pylist() == [0, 12, -3]
    assert parse_labels(["01", "1", "2"]).to_pylist() == ["01", "1", "2"]
    assert parse_labels(["+1", "2"]).to_pylist() == ["+1", "2"]
    assert parse_labels(["+1", "002"], earlier=True).to_pylist() == [1, 2]
