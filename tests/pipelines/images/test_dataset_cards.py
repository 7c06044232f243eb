"""Cards of data sets and the patterns in them. Hostile ones are in test_hostile_files.py."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.recipe import ImagesConfig
from pipelines.images.dataset_card import read_card
from pipelines.images.globs import match_any
from pipelines.images.open import open_source
from pipelines.images.yaml_block import YamlError, load_yaml
from raydit.errors import InvalidInput


def test_class_names_are_found_in_cards_with_merges_and_aliases():
    card = "---\na: &a {config_name: default}\ndataset_info:\n  <<: *a\n  features: []\n---\n\n# Title\n"
    assert read_card(card.encode(), "x")["dataset_info"] == {"config_name": "default", "features": []}
    assert read_card(b"--- \r\na: 1\r\n---\r\nb: 2\n", "x") == {"a": 1}
    assert read_card(b"# Title\n---\na: 1\n---\n", "x") == read_card(b"---\na: 1\n", "x") == {}


def parquet_with(folder, card="", infos=None):
    """Write a data set with two images, whose classes only its card or dataset_infos.json names. Returns its images."""
    folder.mkdir()
    rows = {"image": [{"bytes": b"0"}, {"bytes": b"1"}], "kind": [1, 0]}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    if card:
        (folder / "README.md").write_text(card)
    if infos is not None:
        (folder / "dataset_infos.json").write_text(json.dumps(infos))
    return open_source(ImagesConfig(path=str(folder)))


def card_of(names):
    kind = "{class_label: {names: " + names + "}}"
    return "---\ndataset_info:\n  features:\n  - {name: kind, dtype: " + kind + "}\n---\n"


def infos_of(names):
    return {"default": {"features": {"kind": {"_type": "ClassLabel", "names": names}}}}


@pytest.mark.parametrize(
    ("names", "expected"),
    [("[5, 7]", ("5", "7")), ("{'1': 1.5, '0': x}", ("x", "1.5")), ("['yes', 'no']", ("yes", "no"))],
)
def test_class_names_that_yaml_reads_as_numbers_are_texts(tmp_path, names, expected):
    listing = parquet_with(tmp_path / "set", card_of(names)).listing()
    assert (listing.class_names, listing.labels.tolist()) == (expected, [1, 0])


def test_numbers_as_class_names_in_dataset_infos_are_texts(tmp_path):
    assert parquet_with(tmp_path / "set", infos=infos_of([5, 7])).listing().class_names == ("5", "7")


def test_class_names_that_yaml_reads_as_truth_values_are_to_be_quoted(tmp_path):
    with pytest.raises(InvalidInput, match="README.md: .*a class name is read as true or false: quote the names"):
        parquet_with(tmp_path / "set", card_of("[yes, no]")).listing()
    with pytest.raises(InvalidInput, match="dataset_infos.json: .*true or false: quote the names"):
        parquet_with(tmp_path / "other", infos=infos_of([True, False])).listing()


def test_class_names_with_half_of_a_surrogate_pair_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="dataset_infos.json: .*class names must be Unicode"):
        parquet_with(tmp_path / "set", infos=infos_of(["a", "\ud800"])).listing()
    features = {"kind": {"_type": "ClassLabel", "names": ["a", "\ud800"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pq.read_table(tmp_path / "set" / "train.parquet").replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(InvalidInput, match="found the class name .* in a schema's metadata, expected Unicode"):
        open_source(ImagesConfig(path=str(tmp_path / "table.parquet"))).listing()


def test_more_merges_than_a_card_needs_are_refused():
    with pytest.raises(YamlError, match="more than 64 mappings are merged"):
        load_yaml("a: &a {x: 1}\nb: {<<: [" + "*a, " * 100 + "]}")


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("data/train-*", ["data/train-0.tar"], ["data/train/0.tar", "data/test-0.tar", "train-0.tar"]),
        ("**/train/*.tar", ["train/a.tar", "x/y/train/a.tar"], ["train/x/a.tar", "xtrain/a.tar"]),
        ("a**b*c", ["a/b/bc", "abc"], ["a/b/c", "ab"]),
        ("?[ab].tar", ["xa.tar", "xb.tar"], ["xc.tar", "/a.tar", "a.tar"]),
        ("a.tar", ["a.tar"], ["ab.tar", "x/a.tar", "a-tar"]),
        ("**/**/x**", ["x", "a/b/x", "a/xb/c"], ["ax", "a/bx"]),
    ],
)
def test_patterns_match_paths_as_shells_do(pattern, matching, others):
    matches = match_any([pattern], "the card")
    assert all(map(matches, matching)) and not any(map(matches, others))


def test_patterns_are_bounded_and_names_without_wildcards_are_not():
    names = [f"data/{index:05d}.tar" for index in range(2000)]
    assert all(map(match_any(names, "the card"), names))
    with pytest.raises(InvalidInput, match="found 2,000 patterns, expected at most 256"):
        match_any([f"{name}*" for name in names], "the card")
