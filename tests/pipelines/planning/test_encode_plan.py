"""`raydit encode --dry-run` says what the job then does, and touches nothing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeContext
from PIL import Image
from tiny import RECIPE, place_flags, tiny_recipe
from tiny_encode import encode_here, recipe

from pipelines.cli import main as cli
from pipelines.encode import encode
from pipelines.images.listing import Listing
from pipelines.latents.shards import plan_shards
from pipelines.planning.encode_plan import encode_plan_lines, make_encode_plan, padding_share
from raydit.errors import InvalidInput


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr("pipelines.planning.encode_plan.MEASURED_SECONDS", 0.0)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_job_writes_what_was_planned(tmp_path, monkeypatch):
    config = recipe(tmp_path, "images.held_out=0.3", "encode.flip=true")
    before = snapshot(tmp_path)
    plan = make_encode_plan(config)
    assert snapshot(tmp_path) == before
    dataset = encode_here(config, monkeypatch)
    shards = dataset.shards
    assert (plan.shards, plan.pending_shards, plan.classes) == (len(shards), len(shards), 3)
    assert plan.images + plan.held_out == 37
    assert plan.images == plan.pending_images == len(dataset) + dataset.num_quarantined
    assert plan.moments_shape == dataset.moments_shape
    arrays = dataset.arrays
    moments = arrays.moments.nbytes + arrays.moments_flip.nbytes
    assert plan.bytes == moments * plan.images / len(dataset) <= dataset.num_bytes
    assert plan.seconds == pytest.approx(plan.images / plan.images_per_second)
    assert plan.seconds_to_read > 0 and plan.seconds_to_encode > 0
    after = make_encode_plan(config)
    assert (after.pending_shards, after.bytes, after.changed) == (0, 0, [])


def test_a_plan_counts_new_images_and_what_would_start_over(tmp_path, monkeypatch):
    encode_here(recipe(tmp_path), monkeypatch)
    pixels = np.zeros((20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "blob" / "new.png")
    grown = make_encode_plan(recipe(tmp_path))
    assert (grown.shards, grown.pending_shards, grown.pending_images, grown.changed) == (6, 1, 1, [])
    config = recipe(tmp_path, "encode.flip=true")
    over = make_encode_plan(config)
    assert (over.shards, over.pending_images, over.changed) == (5, 38, ["encode.flip: false -> true"])
    said = "because encode.flip: false -> true; the earlier latents are kept in superseded/"
    assert ("start over", said) in encode_plan_lines(over, config.encode)


def test_a_plan_counts_shards_with_unusable_images_that_the_job_reads_again(tmp_path, monkeypatch):
    config = recipe(tmp_path, "encode.max_quarantined=0")
    with pytest.raises(ValueError, match="unusable"):  # in the second of five shards
        encode_here(config, monkeypatch)
    assert make_encode_plan(config).pending_shards == 4
    assert make_encode_plan(recipe(tmp_path)).pending_shards == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["images.held_out=0.999999"],
            "images.path: found no image to train on in .*, with images.held_out = 0.999999, expected at least one. "
            "Correct images.path or images.held_out",
        ),
        (["images.classes=['empty']"], r"with images.classes = \['empty'\].* Correct images.path or images.classes"),
    ],
)
def test_a_recipe_without_training_images_is_refused_before_any_work(tmp_path, overrides, message):
    config = recipe(tmp_path, "images.class_names=['blob', 'ring', 'stripe', 'empty']", *overrides)
    for refuse in (make_encode_plan, lambda config: encode(config, context=FakeContext())):
        with pytest.raises(InvalidInput, match=message):
            refuse(config)


def test_an_archive_without_images_is_refused_before_any_work(tmp_path):
    np.savez(tmp_path / "none.npz", np.zeros((0, 16, 16, 3), np.uint8))
    config = recipe(tmp_path, f"images.path={tmp_path}/none.npz")
    for refuse in (make_encode_plan, lambda config: encode(config, context=FakeContext())):
        with pytest.raises(InvalidInput, match="found no image to train on in .*none.npz, expected at least one"):
            refuse(config)


def test_only_the_time_is_unknown_before_the_autoencoder_is_trained(tmp_path):
    config = tiny_recipe(tmp_path)
    plan = make_encode_plan(config)
    assert plan.moments_shape == (8, 8, 8) and plan.bytes == 1024 * plan.images
    assert plan.seconds is None
    assert "no estimate: the autoencoder is trained first" in dict(encode_plan_lines(plan, config.encode))["time"]


def test_an_autoencoder_that_is_not_on_this_machine_is_not_downloaded(tmp_path):
    config = tiny_recipe(tmp_path)
    pretrained = type(config.autoencoder)(id="nobody/no-such-autoencoder")
    plan = make_encode_plan(type(config)(**{**vars(config), "autoencoder": pretrained}))
    assert (plan.bytes, plan.seconds) == (None, None) and plan.pending_images == plan.images
    assert plan.unknown == "nobody/no-such-autoencoder is not on this machine"


def test_the_shape_of_stable_diffusions_latents_is_known_without_their_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    config = tiny_recipe(tmp_path, "images.size=256")
    pretrained = type(config.autoencoder)(id="stabilityai/sd-vae-ft-ema")
    plan = make_encode_plan(type(config)(**{**vars(config), "autoencoder": pretrained}))
    assert plan.moments_shape == (8, 32, 32) and plan.bytes == 16_384 * plan.images
    assert (plan.seconds, plan.unknown) == (None, "stabilityai/sd-vae-ft-ema is not on this machine")


@pytest.mark.parametrize(("shard_rows", "batch_size", "said"), [(8, 6, True), (8, 8, False), (16, 8, False)])
def test_much_padding_is_reported_if_another_shard_size_avoids_it(tmp_path, shard_rows, batch_size, said):
    config = recipe(tmp_path, f"encode.shard_rows={shard_rows}", f"encode.batch_size={batch_size}")
    assert ("padding" in dict(encode_plan_lines(make_encode_plan(config), config.encode))) is said


@pytest.mark.parametrize(
    ("rows", "shard_rows", "share"), [(96, 32, 0.0), (97, 32, 1 - 97 / 128), (90, 30, 1 - 90 / 96)]
)
def test_padding_fills_the_last_batch_of_every_shard(tmp_path, rows, shard_rows, share):
    listing = Listing([str(row) for row in range(rows)], np.zeros(rows, np.int32), np.zeros(rows, np.int64), ())
    assert padding_share(plan_shards(tmp_path, listing, None, shard_rows), 32) == pytest.approx(share)


def test_the_command_prints_recipe_and_plan_and_touches_nothing(tmp_path, monkeypatch, capsys):
    flags = place_flags(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["raydit", "encode", str(RECIPE), *flags, "--dry-run", "--json"])
    cli.main()
    out = capsys.readouterr().out
    resolved, end = json.JSONDecoder().raw_decode(out)
    plan = json.loads(out.splitlines()[-1])
    assert resolved["encode"]["max_quarantined"] == 0.05
    assert f"{plan['images']:,} in 3 classes" in out[end:] and plan["bytes"] == plan["pending_images"] * 1024
    assert snapshot(tmp_path) == before


def test_superseded_latents_of_these_settings_are_no_work(tmp_path, monkeypatch):
    encode_here(recipe(tmp_path), monkeypatch)
    encode_here(recipe(tmp_path, "encode.flip=true"), monkeypatch)
    plan = make_encode_plan(recipe(tmp_path))
    assert (plan.shards, plan.pending_images, plan.changed) == (5, 0, [])
    superseded = tmp_path / "output" / "superseded" / "latents-1"
    assert f"latents of these settings are in {superseded}, and are taken back" in plan.notes


def test_free_space_is_that_of_the_latents_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.storage.free_bytes", lambda path: len(path))
    config = tiny_recipe(tmp_path, f"encode.output={tmp_path}/elsewhere/latents")
    assert make_encode_plan(config).free_bytes == len(f"{tmp_path}/elsewhere/latents")
