"""Cards of data sets and the patterns in them. Hostile ones are in test_hostile_files.py."""

import pytest

from pipelines.images.card import read_card
from pipelines.images.globs import match_any
from pipelines.images.yaml_block import YamlError, load_yaml
from raydit.errors import InvalidInput


def test_class_names_are_found_in_cards_with_merges_and_aliases():
    card = "---\na: &a {config_name: default}\ndataset_info:\n  <<: *a\n  features: []\n---\n\n# Title\n"
    assert read_card(card.encode(), "x")["dataset_info"] == {"config_name": "default", "features": []}
    assert read_card(b"--- \r\na: 1\r\n---\r\nb: 2\n", "x") == {"a": 1}
    assert read_card(b"# Title\n---\na: 1\n---\n", "x") == read_card(b"---\na: 1\n", "x") == {}


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
