"""An output keeps the splits and classes that its latents were made with; a recipe for classes needs some."""

import json

import numpy as np
import pytest
from pictures import encoded, square, write, write_tar
from PIL import Image
from tiny_encode import Context, encode_here, recipe

from pipelines.latents.recorded_images import list_images
from pipelines.run import check_stages
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext

NAMES = ("Testing/cat/3.png", "Training/cat/1.png", "Training/dog/2.png", "unlabelled/4.png")


@pytest.fixture
def config(tmp_path):
    def make(*overrides: str):
        return recipe(tmp_path, f"images.path={tmp_path / 'set'}", f"output={tmp_path / 'out'}", *overrides)

    for number, name in enumerate(NAMES):
        write(tmp_path / "set" / name, encoded(square(50 * number, 16)))
    return make


def test_an_output_keeps_the_splits_of_its_latents_and_a_new_one_has_the_right_ones(
    config, tmp_path, monkeypatch, capsys
):
    made = encode_here(config("images.reading=earlier"), monkeypatch)
    assert made.class_names == ("Testing", "Training", "unlabelled")
    capsys.readouterr()
    kept = encode_here(config(), monkeypatch)
    assert (kept.path, kept.fingerprint) == (made.path, made.fingerprint)
    assert "recognised as in an earlier release" in capsys.readouterr().out
    reference = RealImages.of(ScoringSettings.from_recipe(config())).training
    assert reference.digest == made.identity["images"]["digest"]  # so that protocols stay what they were
    write(tmp_path / "set" / "Training" / "cat" / "9.png", encoded(square(9, 16)))
    grown = encode_here(config(), monkeypatch)
    assert len(grown) == 5 and grown.class_names == made.class_names and not (tmp_path / "out" / "superseded").exists()

    capsys.readouterr()
    fresh = encode_here(config(f"output={tmp_path / 'other'}"), monkeypatch)
    assert fresh.class_names == ("cat", "dog") and len(fresh) == 3
    assert 'encode       3 images in 2 classes\nencode       the split "train" is used' in capsys.readouterr().out


def test_an_output_of_images_that_are_refused_by_now_goes_on(config, tmp_path, monkeypatch):
    write(tmp_path / "set" / "metadata.csv", b"file_name,label\nTraining/cat/1.png,cat\nTraining/dog/2.png,\n")
    made = encode_here(config("images.reading=earlier"), monkeypatch)
    assert made.class_names == ("", "cat")
    assert encode_here(config(), monkeypatch).fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="column label: found no label, .*without one: Training/dog/2.png"):
        encode_here(config(f"output={tmp_path / 'other'}"), monkeypatch)


@pytest.mark.parametrize(
    ("made_with", "classes", "count"),
    [
        ((), ("1", "2", "10"), 4),
        (("images.reading=earlier",), ("1", "10", "2"), 3),
        (("images.reading=earlier", "images.class_order=numeric"), ("1", "2", "10"), 3),
    ],
)
def test_an_output_keeps_its_reading_and_its_order_of_classes(tmp_path, monkeypatch, capsys, made_with, classes, count):
    """Of images that both would change: a TGA file is read by now, and classes are numbers."""
    for number, name in enumerate(("train/1/a.png", "train/2/a.png", "train/10/a.png", "test/1/a.png")):
        write(tmp_path / "set" / name, encoded(square(50 * number, 16)))
    write(tmp_path / "set" / "train" / "10" / "b.tga", encoded(square(9, 16), "TGA"))
    plain = recipe(tmp_path, f"images.path={tmp_path / 'set'}")
    made = encode_here(recipe(tmp_path, f"images.path={tmp_path / 'set'}", *made_with), monkeypatch)
    assert (made.class_names, len(made)) == (classes, count)
    capsys.readouterr()
    assert encode_here(plain, monkeypatch).fingerprint == made.fingerprint
    assert ("recognised as in an earlier release" in capsys.readouterr().out) == bool(made_with)
    write(tmp_path / "set" / "train" / "2" / "b.png", encoded(square(99, 16)))
    grown = encode_here(plain, monkeypatch)
    assert (grown.class_names, len(grown)) == (classes, 5)  # with the TGA file, as one that was added
    assert not (tmp_path / "output" / "superseded").exists()


def test_an_output_goes_on_without_labels_whose_names_were_not_those_of_images(tmp_path, monkeypatch):
    """A leading "./" made other samples of them."""
    names = ("./1.png", "./2.png", "1.cls", "2.cls")
    file = write_tar(tmp_path / "x.tar", {name: encoded(square(9, 16)) for name in names[:2]})
    without = ("evaluate.cfg_scale=1.0", "evaluate.labels=random")
    config = recipe(tmp_path, f"images.path={file}", *without)
    made = encode_here(config, monkeypatch)
    write_tar(file, {name: encoded(square(9, 16)) if name.endswith("png") else b"cat" for name in names})
    kept = encode_here(config, monkeypatch)
    assert (kept.fingerprint, kept.class_names) == (made.fingerprint, ())
    fresh = encode_here(recipe(tmp_path, f"images.path={file}", f"output={tmp_path / 'new'}", *without), monkeypatch)
    assert (len(fresh), fresh.class_names) == (2, ("cat",))


def test_nothing_is_recorded_of_the_reading_unless_it_is_set(config, monkeypatch):
    dataset = encode_here(config(), monkeypatch)
    assert "reading" not in json.dumps(dataset.identity) and "earlier" not in json.dumps(dataset.recipe)
    assert list_images(config())[0].images.reading is None


@pytest.mark.parametrize(
    ("override", "named"), [("evaluate.cfg_scale=2.0", "cfg_scale = 2"), ('evaluate.labels="balanced"', "labels =")]
)
def test_images_without_classes_are_refused_for_a_recipe_with_classes(config, tmp_path, monkeypatch, override, named):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [encoded(square(9, 16))] * 2, "species": [0, 1], "weight": [1.0, 2.0]})
    (tmp_path / "flat").mkdir()
    pq.write_table(table, tmp_path / "flat" / "x.parquet")
    path = f"images.path={tmp_path / 'flat'}"
    plain = ("evaluate.cfg_scale=1.0", "evaluate.labels=random")
    asks = config(path, *plain, override)
    refusal = rf"columns species, weight, .*evaluate.{named}.* Set images.label_column"
    with pytest.raises(ValueError, match=refusal):
        encode_here(asks, monkeypatch)
    with pytest.raises(ValueError, match=refusal):  # a pipeline, before any stage
        check_stages(asks, list_images(asks)[1], StageContext(asks))
    encode_here(config(path, *plain), monkeypatch)  # without classes, as asked
    assert len(encode_here(asks, monkeypatch)) == 2  # goes on as it began
    chosen = config(path, *plain, override, "images.label_column=species", f"output={tmp_path / 'other'}")
    assert encode_here(chosen, monkeypatch).class_names == ("0", "1")


def test_a_shard_without_a_usable_image_is_all_quarantined(config, tmp_path, monkeypatch):
    for number in range(12):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
        write(tmp_path / "lfs" / "a" / f"{number:02d}.png", pointer if number < 8 else encoded(square(9, 16)))
    settings = ("encode.shard_rows=4", "encode.flip=true", "evaluate.cfg_scale=1.0")
    dataset = encode_here(config(f"images.path={tmp_path / 'lfs'}", *settings), monkeypatch)
    assert (len(dataset), dataset.num_quarantined) == (4, 8)
    assert {image.error for image in dataset.read_quarantine()} == {
        "ValueError: a Git LFS pointer instead of the image: run git lfs pull where the images come from"
    }


def test_10_and_12_bit_data_in_16_bits_are_warned_of_with_their_number(config, tmp_path, monkeypatch, capsys):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name, factor in {"ten": 4, "twelve": 16, "sixteen": 256}.items():
        write(tmp_path / "deep" / "a" / f"{name}.png", encoded(Image.fromarray(values * factor)))
    write(tmp_path / "deep" / "a" / "black.png", encoded(Image.fromarray(values * 0)))
    context = Context()
    encode_here(config(f"images.path={tmp_path / 'deep'}", "evaluate.cfg_scale=1.0"), monkeypatch, context)
    assert "warning: 2 images are decoded nearly black: " in capsys.readouterr().out


def test_an_output_of_a_split_that_is_not_there_goes_on(tmp_path, monkeypatch):
    for name in ("cat/1.png", "dog/2.png"):
        write(tmp_path / "set" / name, encoded(square(9, 16)))

    def config(output: str, *overrides: str):
        paths = (f"images.path={tmp_path / 'set'}", f"output={tmp_path / output}")
        return recipe(tmp_path, *paths, "images.split=test", *overrides)

    made = encode_here(config("out", "images.reading=earlier"), monkeypatch)
    assert encode_here(config("out"), monkeypatch).fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="images.split: found 'test', expected one of .*: no splits"):
        encode_here(config("other"), monkeypatch)
