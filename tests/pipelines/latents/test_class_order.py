"""Classes whose names are numbers lie in the order of these numbers, but for an output that has them in another."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_encode import encode_here, recipe

from pipelines.artifacts import Artifact
from pipelines.images.open import open_source
from pipelines.latents.class_order import with_recorded_class_order
from pipelines.latents.recorded_images import list_images
from pipelines.planning.encode_plan import make_encode_plan
from pipelines.scoring.real_images.references import reference_digest
from pipelines.scoring.sample_grid import class_label, split_class_list
from pipelines.scoring.settings import ScoringSettings

SORTED = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
BY_VALUE = tuple(map(str, range(12)))


def write_numbers(folder, numbers, table=False):
    """Write one image for each number: in a folder of that name, or named by a table of labels."""
    rng = np.random.default_rng(0)
    lines = ["file_name,label"]
    for number in numbers:
        name = f"images/{number}.png" if table else f"images/{number}/a.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        lines.append(f"{number}.png,{number}")
    if table:
        (folder / "images" / "metadata.csv").write_text("\n".join(lines) + "\n")


def labels_by_key(dataset):
    tables = [table.to_pylist() for table in dataset.tables(["key", "label"])]
    return {row["key"].partition("/")[0].removesuffix(".png"): row["label"] for table in tables for row in table}


@pytest.mark.slow
def test_numbers_are_classes_in_numeric_order_in_a_new_output(tmp_path, monkeypatch, capsys):
    write_numbers(tmp_path, range(12))
    (tmp_path / "images" / "12").mkdir()
    config = recipe(tmp_path)
    assert open_source(config.images).listing().class_names == SORTED
    plan = make_encode_plan(config)
    dataset = encode_here(config, monkeypatch)
    assert dataset.class_names == BY_VALUE and labels_by_key(dataset) == {name: int(name) for name in BY_VALUE}
    out = capsys.readouterr().out
    assert "classes are the numbers that images have, in order: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11" in out
    note = "1 folder contains no images and is not counted as a class (12)"
    assert note in out and plan.notes == (note,)
    # What follows knows the order from the artifacts.
    assert dataset.recipe["images"]["class_order"] == "numeric"
    assert with_recorded_class_order(config, dataset.recipe) == list_images(config)[0]
    again = encode_here(config, monkeypatch)
    assert again.fingerprint == dataset.fingerprint and "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["latents", "plan", "autoencoder"])
def test_an_output_that_has_the_earlier_order_keeps_it(tmp_path, monkeypatch, capsys, left):
    """As commit 707a9da wrote it: finished latents, an encode that was interrupted, or an autoencoder."""
    write_numbers(tmp_path, range(12))
    config = recipe(tmp_path)
    digest = open_source(config.images).listing().digest
    reference = reference_digest(ScoringSettings.from_recipe(config))
    earlier = encode_here(recipe(tmp_path, "images.class_order=sorted"), monkeypatch)
    file = tmp_path / "output" / "latents" / "manifest.json"
    file.write_text(json.dumps({**earlier.manifest, "recipe": {}}))
    if left != "latents":
        file.unlink()
    if left == "autoencoder":
        shutil.rmtree(file.parent)
        Artifact("autoencoder", str(tmp_path / "output" / "autoencoder"), {"images": {"digest": digest}}).prepare()
    capsys.readouterr()
    dataset = encode_here(config, monkeypatch)
    assert dataset.class_names == SORTED and dataset.fingerprint == earlier.fingerprint
    assert dataset.identity["images"]["digest"] == digest
    assert "class_order" not in dataset.recipe.get("images", {}) and not (tmp_path / "output" / "superseded").exists()
    assert list_images(config)[0] == config
    assert reference_digest(ScoringSettings.from_recipe(config)) == reference


def test_labels_from_one_make_no_class_without_images(tmp_path, monkeypatch):
    write_numbers(tmp_path, range(1, 11), table=True)
    config = recipe(tmp_path)
    dataset = encode_here(config, monkeypatch)
    assert dataset.class_names == tuple(map(str, range(1, 11)))
    assert labels_by_key(dataset) == {str(number): number - 1 for number in range(1, 11)}
    assert class_label("10", dataset.class_names) == 9
    with pytest.raises(ValueError, match="class '0'"):
        class_label("0", dataset.class_names)


def test_names_of_classes_may_hold_digits_commas_and_spaces():
    names = ("cat", "0", "cat, tabby", "7 up", " dog")
    for text, labels in {
        "cat, tabby": [2],  # the whole name, not a list
        "cat,7 up,  0": [0, 3, 1],
        "0": [1],  # a name wins over a number
        "3, dog": [3, 4],
        "1,2": [1, 2],
    }.items():
        assert [class_label(name, names) for name in split_class_list(text, names)] == labels
    for text in ("5", "²", "tabby", ""):
        with pytest.raises(ValueError, match="expected one of 'cat', '0', 'cat, tabby'.*or a number below 5"):
            class_label(text, names)


def test_classes_without_images_are_said_where_they_stay(tmp_path, monkeypatch, capsys):
    write_numbers(tmp_path, range(1, 11), table=True)
    dataset = encode_here(recipe(tmp_path, "images.class_order=sorted"), monkeypatch)
    assert dataset.class_names == tuple(map(str, range(11)))
    assert "1 of 11 classes have no images to train on (0): the model cannot learn them, but" in capsys.readouterr().out


def test_other_names_are_left_as_they_are(tmp_path):
    """So that recipes, identities and digests stay what they were."""
    config = recipe(tmp_path)
    assert list_images(config)[0] is config
    write_numbers(tmp_path / "digits", range(10))
    digits = recipe(tmp_path, f"images.path={tmp_path / 'digits' / 'images'}")
    assert list_images(digits)[0] is digits
