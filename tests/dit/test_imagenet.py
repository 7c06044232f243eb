"""The names of ImageNet's classes, and the matching of classes by name."""

import pytest

from dit.imagenet import imagenet_names, imported_names, match_names


def test_the_classes_of_imagenet_have_unique_names_in_the_order_of_the_labels():
    names = imagenet_names()
    assert len(names) == 1000 == len(set(names))
    # Labels that the published grids of DiT show: golden retriever, otter, red panda, geyser, macaw.
    shown = {207: "golden retriever", 360: "otter", 387: "lesser panda", 974: "geyser", 88: "macaw"}
    assert {label: names[label] for label in shown} == shown
    assert [name for name in names if "crane" in name.split()] == ["crane (n02012849)", "crane (n03126707)"]


def test_the_names_are_those_that_torchvision_knows():
    meta = pytest.importorskip("torchvision.models._meta")
    different = [
        pair
        for pair in zip(imagenet_names(), meta._IMAGENET_CATEGORIES, strict=True)
        if pair[0].split(" (")[0].split(", ")[0] != pair[1]
    ]
    assert len(different) <= 4, different


def test_weights_with_another_number_of_classes_have_numbers():
    assert imported_names(3) == ["0", "1", "2"] and imported_names(1000) == [*imagenet_names()]


def test_classes_match_by_name_and_those_of_imagenet_by_any_of_their_names():
    base = imagenet_names()
    found = match_names(base, ["n01440764", "goldfish", "goldfish, Carassius auratus", "my cat", "crane"])
    assert found == [0, 1, 1, None, None]
    assert match_names(["b", "a"], ["a", "c", "b"]) == [1, None, 0]
    assert match_names(["n01440764"], ["tench, Tinca tinca"]) == [0]
    assert match_names([], ["a"]) == [None] and match_names(["a"], []) == []
