"""Images that are added, removed or replaced, interrupted jobs, and unusable images; all without Ray."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import write_images
from tiny_encode import Context, add_images, encode_here, recipe, rows_by_key

from pipelines.images.decoding import try_decode
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.verify import verify
from raydit.errors import InUse


@pytest.fixture
def encode(tmp_path, monkeypatch):
    """Encode the images in tmp_path/images; `kill_after`: interrupt it after this number of shards."""

    def call(*overrides, kill_after=None, context=None):
        context = context or Context(kill_after)
        config = recipe(tmp_path, *overrides)
        if kill_after is None:
            return encode_here(config, monkeypatch, context)
        with pytest.raises(KeyboardInterrupt):
            encode_here(config, monkeypatch, context)

    return call


def content(folder) -> dict[str, bytes]:
    """Return every file of the latents by its name."""
    return {file.name: file.read_bytes() for file in (folder / "output" / "latents").iterdir()}


def times(folder) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "output" / "latents").glob("part-*")}


def test_only_new_images_are_encoded(encode, tmp_path, capsys):
    first = encode()
    before = times(tmp_path)
    add_images(tmp_path)
    second = encode()
    assert "adds 3 images to 36 latents" in capsys.readouterr().out
    assert {name: times(tmp_path)[name] for name in before} == before
    assert [shard.file for shard in second.shards[len(before) :]] == ["part-00005.parquet"]
    assert (second.revision, len(second), second.num_quarantined) == (2, 39, 1)
    assert second.fingerprint != first.fingerprint
    assert all(check.ok for check in verify(second))
    encode()
    assert "already finished: 39 latents" in capsys.readouterr().out


def test_a_fresh_encode_of_the_grown_source_has_the_same_rows(encode, tmp_path):
    encode()
    add_images(tmp_path)
    grown = encode()
    grown_rows = rows_by_key(grown)
    shutil.rmtree(grown.path)
    fresh = encode()
    assert fresh.revision == 1 and rows_by_key(fresh) == grown_rows and list(rows_by_key(fresh)) != list(grown_rows)
    for name in ("latents_mean", "latents_std"):
        np.testing.assert_allclose(grown.manifest[name], fresh.manifest[name], rtol=1e-12)


def test_growing_twice_gives_the_same_files_after_interruptions(encode, tmp_path):
    many = [f"ring/x{index:02d}.png" for index in range(20)]
    encode()
    shutil.copytree(tmp_path, tmp_path / "start")
    add_images(tmp_path)
    encode()
    add_images(tmp_path, many)
    (tmp_path / "images" / "ring" / "broken.png").write_bytes(b"")
    encode()
    unbroken = content(tmp_path)
    assert json.loads(unbroken["manifest.json"])["revision"] == 3

    for name in ("images", "output"):
        shutil.rmtree(tmp_path / name)
        shutil.move(tmp_path / "start" / name, tmp_path / name)
    add_images(tmp_path)
    encode(kill_after=0)
    encode()
    add_images(tmp_path, many)
    (tmp_path / "images" / "ring" / "broken.png").write_bytes(b"")
    encode(kill_after=2)
    valid = LatentDataset.open(tmp_path / "output" / "latents")
    assert (valid.revision, len(valid)) == (2, 39) and len(rows_by_key(valid)) == 39
    encode()
    assert content(tmp_path) == unbroken


def test_images_added_during_an_unfinished_growth_reuse_no_stale_shard(encode, tmp_path):
    encode()
    add_images(tmp_path, [f"ring/x{index:02d}.png" for index in range(20)])
    encode(kill_after=2)
    add_images(tmp_path, ["blob/000a.png"], seed=2)  # shifts every shard that was planned
    dataset = encode()
    assert len(dataset) == 57 and all(check.ok for check in verify(dataset))


def test_shards_of_an_abandoned_plan_are_removed(encode, tmp_path):
    encode()
    first = content(tmp_path)
    more = [f"ring/x{index:02d}.png" for index in range(20)]
    add_images(tmp_path, more)
    encode(kill_after=2)
    for name in more[1:]:
        (tmp_path / "images" / name).unlink()
    dataset = encode()
    assert len(dataset) == 37 and all(check.ok for check in verify(dataset))
    assert {name for name in content(tmp_path) if name.startswith("part")} == {
        *(name for name in first if name.startswith("part")),
        "part-00005.parquet",
    }


def test_shards_of_images_that_were_added_and_removed_again_are_removed(encode, tmp_path, capsys):
    """Other tools would read them by the pattern part-*.parquet."""
    first, before = encode(), content(tmp_path)
    more = [f"ring/x{index:02d}.png" for index in range(20)]
    add_images(tmp_path, more)
    encode(kill_after=2)
    for name in more:
        (tmp_path / "images" / name).unlink()
    assert len({*os.listdir(first.path)} - before.keys()) == 3  # two shards, and the folder of their records
    assert encode().fingerprint == first.fingerprint and content(tmp_path) == before
    assert "already finished: 36 latents" in capsys.readouterr().out
    assert all(check.ok for check in verify(first))


def test_surplus_shards_of_earlier_releases_are_removed_unless_another_process_works_there(encode, tmp_path, capsys):
    first, before = encode(), content(tmp_path)
    stray = Path(first.path) / "part-00005.parquet"
    stray.write_bytes(b"of an abandoned attempt")
    (Path(first.path) / ".records").mkdir()
    context = Context()
    context.holding_folder = refuse_to_hold
    assert encode(context=context).fingerprint == first.fingerprint
    assert "files that the manifest does not list stay in" in capsys.readouterr().out and stray.is_file()
    encode()
    out = capsys.readouterr().out
    assert "already finished: 36 latents" in out and "stay in" not in out and content(tmp_path) == before


def refuse_to_hold(folder, *, field):
    raise InUse(f"{folder} is in use", "no other process", "wait")


def test_an_interrupted_first_encode_reuses_the_shards_that_still_fit(encode, tmp_path, capsys):
    encode(kill_after=3)
    done = times(tmp_path)
    add_images(tmp_path, ["stripe/000a.png"])
    dataset = encode()
    kept = sorted(name for name, time in times(tmp_path).items() if done.get(name) == time)
    assert kept == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert dataset.revision == 1 and all(check.ok for check in verify(dataset))
    assert not (tmp_path / "output" / "superseded").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda images: (images / "ring" / "003.png").unlink(), "1 image is gone, such as ring/003.png"),
        (lambda images: (images / "blob" / "000.png").write_bytes(b"other"), "images, their labels or class names"),
        (lambda images: (images / "ring").rename(images / "aring"), "12 images are gone, such as ring/000.png"),
        (lambda images: shutil.copytree(images / "ring", images / "xring"), "images, their labels or class names"),
    ],
)
def test_removed_or_replaced_images_restart_and_keep_the_earlier_latents(encode, tmp_path, capsys, change, why):
    encode()
    change(tmp_path / "images")
    dataset = encode()
    assert why in capsys.readouterr().out
    assert dataset.revision == 1 and all(check.ok for check in verify(dataset))
    assert len(LatentDataset.open(tmp_path / "output" / "superseded" / "latents-1")) == 36


def test_a_changed_setting_restarts_even_if_images_were_added(encode, tmp_path, capsys):
    encode()
    add_images(tmp_path)
    dataset = encode("encode.flip=true")
    assert "encode.flip: false -> true" in capsys.readouterr().out
    assert dataset.revision == 1 and len(dataset) == 39
    assert len(LatentDataset.open(tmp_path / "output" / "superseded" / "latents-1")) == 36


def test_too_many_unusable_images_stop_the_job_with_examples_and_keep_finished_shards(encode, tmp_path):
    write_images(tmp_path / "images")
    for index in range(11):
        (tmp_path / "images" / "ring" / f"bad{index:02d}.jpg").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match="found 12 unusable images among 48, such as .*ring/bad00.jpg .*, expected at most 10 "
    ):
        encode()
    latents = tmp_path / "output" / "latents"
    assert not (latents / "manifest.json").exists() and len(list(latents.glob("part-*"))) >= 3
    assert pq.read_table(latents / "quarantine.parquet").num_rows == 12
    before = times(tmp_path)
    with pytest.raises(ValueError, match="found 12 unusable images among 48"):
        encode()  # after another look at the shards with unusable images
    again = {name for name, time in times(tmp_path).items() if before[name] != time}
    assert again == {"part-00001.parquet", "part-00003.parquet", "part-00004.parquet"}
    dataset = encode("encode.max_quarantined=0.5")
    assert dataset.num_quarantined == 12 and len(dataset) == 36


def test_images_that_could_not_be_read_are_read_again_once_they_can_be(encode, tmp_path, monkeypatch):
    """Neither their names nor their lengths show it, as where permission to read them was missing."""
    write_images(tmp_path / "images")
    refused = {f"ring/{index:03d}.png" for index in range(11)}

    def decode(data, name):
        return PermissionError("cannot be opened") if name in refused else try_decode(data, name)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="found 12 unusable images among 37"):
        patch.setattr("pipelines.images.sources.folder.try_decode", decode)
        encode()
    before = times(tmp_path)
    dataset = encode()
    assert {name for name, time in times(tmp_path).items() if before.get(name) == time} == {"part-00000.parquet"}
    assert (len(dataset), dataset.num_quarantined) == (36, 1) and all(check.ok for check in verify(dataset))
    fresh = encode(f"encode.output={tmp_path}/fresh")
    assert fresh.fingerprint == dataset.fingerprint and rows_by_key(fresh) == rows_by_key(dataset)


def test_one_unusable_image_is_too_many_if_none_is_allowed(encode):
    with pytest.raises(ValueError, match="found 1 unusable images among 37, .*, expected at most 0"):
        encode("encode.max_quarantined=0.0")


def test_a_job_without_a_usable_image_fails(encode, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="found 2 unusable images among 2, .*, expected at most 1"):
        encode()


def test_metrics_are_logged_after_every_shard(encode):
    context = Context()
    encode(context=context)
    images, quarantined, rates = (
        context.last_run.values(f"encode/{name}") for name in ("images", "quarantined", "images_per_second")
    )
    assert list(images) == [8, 16, 24, 32, 37]
    assert (images[37], quarantined[37]) == (36, 1) and rates[37] > 0
