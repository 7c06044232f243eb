"""Latents of held-out images: made by the same steps, resumed, skipped, and never mixed with those for training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import write_images
from tiny_encode import Context, encode_here, recipe, rows_by_key

from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.encode import find_latents
from pipelines.images.held_out import split_images
from pipelines.images.listing import Listing
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.held_out import ImageSet, held_out_latents, held_out_set, training_set
from pipelines.latents.identity import encode_identity
from pipelines.latents.recorded_images import list_images
from pipelines.latents.show import show
from pipelines.latents.verify import verify
from pipelines.planning.encode_plan import encode_plan_lines, make_encode_plan
from pipelines.registry.lineage import lineage
from pipelines.run import check_stages
from raydit.errors import InvalidInput, NotFound

VALIDATES = ("images.held_out=0.3", "train.validate_every=2")


def encode(folder, monkeypatch, *overrides, kill_after=None):
    config = recipe(folder, *overrides)
    if kill_after is None:
        return config, encode_here(config, monkeypatch), held_out_latents(config)
    with pytest.raises(KeyboardInterrupt):
        encode_here(config, monkeypatch, Context(kill_after))
    return config, None, None


def content(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_the_same_image_has_the_same_moments_in_both_sets(tmp_path, monkeypatch):
    _, training, held_out = encode(tmp_path, monkeypatch, *VALIDATES, "encode.flip=true")
    _, everything, none = encode(
        tmp_path / "all", monkeypatch, f"images.path={tmp_path / 'images'}", "encode.flip=true"
    )
    assert none is None and not (tmp_path / "all" / "output" / "latents_held_out").exists()
    rows = [rows_by_key(dataset) for dataset in (training, held_out)]
    assert rows[0].keys().isdisjoint(rows[1]) and len(rows[1]) > 5
    assert rows[0] | rows[1] == rows_by_key(everything)
    assert training.description == held_out.description
    assert len({training.fingerprint, held_out.fingerprint, everything.fingerprint}) == 3
    assert held_out.identity["images"]["held_out"] and "held_out" not in training.identity["images"]


def test_validating_leaves_the_latents_for_training_as_they_are(tmp_path, monkeypatch, capsys):
    config, before, none = encode(tmp_path, monkeypatch, VALIDATES[0])
    assert none is None and not Path(config.latents_held_out).exists()
    files = content(config.latents)
    _, after, held_out = encode(tmp_path, monkeypatch, *VALIDATES)  # only the held-out images are left to encode
    assert content(config.latents) == files and after.fingerprint == before.fingerprint
    assert "held out" in capsys.readouterr().out and len(held_out) + len(after) == 36
    encode(tmp_path, monkeypatch, *VALIDATES)
    said = capsys.readouterr().out
    assert said.count("already finished") == 2 and f"in {config.latents_held_out}" in said


def test_the_identity_of_latents_without_the_new_fields_is_that_of_earlier_releases():
    """The dictionary is what commit cbac0b4 returns for these arguments, the order of its keys included."""
    listing = Listing(["a", "b"], np.array([0, 1], np.int32), np.array([5, 6]), ("one", "two"))
    images, settings = ImagesConfig(path="p", size=16), EncodeConfig(flip=False, shard_rows=8)
    digest = "6bbff9befee8e025b28b08072a058eb8274ade841dbf52ea2134b681d29d888e"
    recorded = {
        "images": {"digest": digest, "count": 2, "size": 16, "crop": "adm"},
        "autoencoder": {"sha256": "ab"},
        "encode": {"flip": False, "shard_rows": 8, "dtype": "float32"},
    }
    assert json.dumps(encode_identity(images, settings, listing, {"sha256": "ab", "id": "x"})) == json.dumps(recorded)
    training = ImageSet("images", "encode/images", "folder", images, listing)
    assert json.dumps(training.identity(settings, {"sha256": "ab", "id": "x"})) == json.dumps(recorded)


def test_an_interrupted_encoding_of_held_out_images_goes_on(tmp_path, monkeypatch):
    _, _, unbroken = encode(tmp_path, monkeypatch, *VALIDATES)
    assert unbroken is not None
    shutil.rmtree(unbroken.path)
    config, _, _ = encode(tmp_path, monkeypatch, *VALIDATES, kill_after=1)
    with pytest.raises(NotFound, match="latents_held_out is not finished"):
        held_out_latents(config)
    (shard,) = Path(config.latents_held_out).glob("part-*")
    time = shard.stat().st_mtime_ns
    _, _, resumed = encode(tmp_path, monkeypatch, *VALIDATES)
    assert shard.stat().st_mtime_ns == time and resumed.manifest == unbroken.manifest


def test_held_out_latents_verify_show_and_quarantine(tmp_path, monkeypatch):
    other = write_images(tmp_path / "other", per_class=3, size=24)  # one of them is broken
    config, training, held_out = encode(tmp_path, monkeypatch, f"images.validation={other}")
    assert (len(training), len(held_out), held_out.num_quarantined) == (36, 9, 1)
    checks = list(verify(held_out))
    assert all(check.ok for check in checks) and "decode to" in checks[-1].found  # compared with the other images
    assert all(check.ok for check in verify(training))
    assert dict(show(held_out, None))["classes"] == "3: blob, ring, stripe"
    assert held_out.class_names == training.class_names
    links = {link.kind: link for link in lineage(held_out.path)}
    assert links.keys() == {"images", "autoencoder", "latents"} and not any(link.broken for link in links.values())
    assert links["images"].facts == ["10 images held out"] and not links["images"].unknown


def test_other_images_for_validation_supersede_the_earlier_ones(tmp_path, monkeypatch):
    first, second = (write_images(tmp_path / name, per_class=count) for name, count in (("one", 2), ("two", 3)))
    config, training, before = encode(tmp_path, monkeypatch, f"images.validation={first}")
    _, again, after = encode(tmp_path, monkeypatch, f"images.validation={second}")
    assert again.fingerprint == training.fingerprint and len(after) == 9 and len(before) == 6
    kept = LatentDataset.open(tmp_path / "output" / "superseded" / "latents_held_out-1")
    assert kept.fingerprint == before.fingerprint


def test_a_subset_of_classes_reaches_both_data_sets(tmp_path, monkeypatch):
    _, training, held_out = encode(tmp_path, monkeypatch, *VALIDATES, 'images.classes=["stripe", "ring"]')
    for dataset in (training, held_out):
        assert dataset.class_names == ("ring", "stripe")
        rows = rows_by_key(dataset)
        assert {(key.partition("/")[0], label) for key, (label, _) in rows.items()} == {("ring", 0), ("stripe", 1)}
    assert len(training) + len(held_out) == 24


def test_latents_elsewhere_have_held_out_ones_beside_them(tmp_path):
    assert recipe(tmp_path, "encode.output=s3://b/latents").latents_held_out == "s3://b/latents_held_out"
    assert recipe(tmp_path, f"encode.output={tmp_path}/l/").latents_held_out == str(tmp_path / "l_held_out")
    assert recipe(tmp_path).latents_held_out == str(tmp_path / "output" / "latents_held_out")


def test_validating_without_held_out_images_is_refused_before_any_work(tmp_path, monkeypatch):
    config = recipe(tmp_path, "train.validate_every=2")
    message = "train.validate_every: found 2 without held-out images.*images.held_out .*images.validation"
    for refuses in (
        lambda: encode_here(config, monkeypatch),
        lambda: make_encode_plan(config),
        lambda: check_stages(config, list_images(config)[1], Context()),
    ):
        with pytest.raises(InvalidInput, match=message):
            refuses()
    assert not (tmp_path / "output").exists()


def test_held_out_latents_of_other_settings_are_refused(tmp_path, monkeypatch):
    config, _, held_out = encode(tmp_path, monkeypatch, *VALIDATES)
    other = recipe(tmp_path, *VALIDATES, "images.size=32")
    encode_here(other, monkeypatch)
    shutil.rmtree(other.latents_held_out)
    shutil.move(tmp_path / "output" / "superseded" / "latents_held_out-1", other.latents_held_out)
    with pytest.raises(InvalidInput, match="found other size or crop, moments, expected the same. Run `raydit encode`"):
        held_out_latents(other)


def test_the_plan_and_the_pipeline_know_what_is_finished(tmp_path, monkeypatch):
    config = recipe(tmp_path, *VALIDATES)
    monkeypatch.setattr("pipelines.planning.encode_plan.MEASURED_SECONDS", 0)
    encode(tmp_path, monkeypatch, VALIDATES[0])
    plan = make_encode_plan(config)
    lines = dict(encode_plan_lines(plan, config.encode))
    assert lines["held out"] == "13 images for validation, 13 to encode" and plan.pending_images == 0
    assert plan.bytes == 13 * plan.bytes_per_image and plan.seconds
    training, held_out = split_images(config.images, list_images(config)[1])
    autoencoder = Path(config.autoencoder.id)
    assert find_latents(config, training_set(config, training), autoencoder)
    assert find_latents(config, held_out_set(config, held_out), autoencoder) is None
    _, _, dataset = encode(tmp_path, monkeypatch, *VALIDATES)
    found = find_latents(config, held_out_set(config, held_out), autoencoder)
    assert found and found.fingerprint == dataset.fingerprint and make_encode_plan(config).images_to_encode == 0
