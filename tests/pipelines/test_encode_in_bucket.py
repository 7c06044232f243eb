"""Latents in a bucket: the same files as on disk, even after interruptions, and all commands take the URI."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_recipe
from tiny_encode import Context, add_images, encode_here, recipe, rows_by_key

from cluster import storage
from pipelines.encode import encode
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.verify import verify
from pipelines.stage import StageContext


def content(folder: str) -> dict[str, bytes]:
    """Return every file of the latents except the manifest, which names the output."""
    names = storage.list_files(folder, recursive=True)
    return {name: storage.read_bytes(storage.join(folder, name)) for name in names if name != "manifest.json"}


@pytest.fixture
def outputs(tmp_path, s3_bucket):
    """The same recipe with its output on disk and in a bucket."""
    config = recipe(tmp_path)
    return config, replace(config, output=f"{s3_bucket}/deep/output")


@pytest.mark.parametrize(
    ("output", "latents"),
    [
        ("out", "{here}/out/latents"),
        ("file://{here}/out", "{here}/out/latents"),
        ("s3://bucket/out?region=us-east-2", "s3://bucket/out/latents?region=us-east-2"),
    ],
)
def test_the_folders_of_an_output_are_absolute_paths_or_uris(tmp_path, monkeypatch, output, latents):
    monkeypatch.chdir(tmp_path)
    config = replace(tiny_recipe(tmp_path), output=output.format(here=tmp_path))
    assert config.folder("latents") == config.latents == latents.format(here=tmp_path)
    elsewhere = replace(config, encode=replace(config.encode, output=config.output))
    assert elsewhere.latents == latents.format(here=tmp_path).replace("/latents", "")


def test_a_bucket_gets_the_same_files_as_a_disk(outputs, monkeypatch):
    here, there = (encode_here(config, monkeypatch) for config in outputs)
    assert there.path == f"{outputs[1].output}/latents" and there.fingerprint == here.fingerprint
    assert content(there.path) == content(here.path)
    opened = LatentDataset.open(there.path)
    np.testing.assert_array_equal(opened.arrays.moments, here.arrays.moments)
    assert opened.read_quarantine() == here.read_quarantine() and len(opened.read_quarantine()) == 1
    assert all(check.ok for check in verify(opened))


def test_an_encode_into_a_bucket_resumes_where_it_was_killed(outputs, monkeypatch, capsys):
    here, there = outputs
    expected = encode_here(here, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        encode_here(there, monkeypatch, Context(kill_after=3))
    with pytest.raises(FileNotFoundError, match="is not finished"):
        LatentDataset.open(there.folder("latents"))
    context = Context()
    dataset = encode_here(there, monkeypatch, context)
    assert list(context.last_run.values("encode/images")) == [32, 37]  # 24 of 37 images were done
    assert content(dataset.path) == content(expected.path)
    encode_here(there, monkeypatch)
    assert "already finished: 36 latents" in capsys.readouterr().out


@pytest.mark.slow
def test_latents_in_a_bucket_grow_and_are_superseded(outputs, monkeypatch, tmp_path, capsys):
    _, there = outputs
    encode_here(there, monkeypatch)
    add_images(tmp_path)
    grown = encode_here(there, monkeypatch)
    assert "adds 3 images to 36 latents" in capsys.readouterr().out
    assert (grown.revision, len(grown), len(rows_by_key(grown))) == (2, 39, 39) and all(
        check.ok for check in verify(grown)
    )
    (tmp_path / "images" / "ring" / "003.png").unlink()
    fresh = encode_here(there, monkeypatch)
    assert "1 image is gone" in capsys.readouterr().out
    assert (fresh.revision, len(fresh)) == (1, 38) and all(check.ok for check in verify(fresh))
    superseded = LatentDataset.open(f"{there.output}/superseded/latents-1")
    grown_there = LatentDataset(superseded.path, grown.manifest)
    assert rows_by_key(superseded) == rows_by_key(grown_there) and len(superseded) == 39


@pytest.mark.slow
def test_a_throttled_bucket_gets_the_same_files(outputs, monkeypatch, throttled):
    here, there = outputs
    throttled.share = 0.1
    expected, found = encode_here(here, monkeypatch), encode_here(there, monkeypatch)
    throttled.share = 0.0
    assert throttled.refused > 0
    assert content(found.path) == content(expected.path)


def test_the_commands_take_a_uri(outputs, monkeypatch, raydit, tmp_path):
    _, there = outputs
    path = encode_here(there, monkeypatch).path
    code, out, err = raydit("latents", "verify", path)
    assert code == 0 and "36 rows + 1 quarantined" in out, err
    code, out, err = raydit("latents", "show", path, "--out", str(tmp_path / "grid.png"))
    assert code == 0 and (tmp_path / "grid.png").stat().st_size > 100, err
    storage.remove_file(f"{path}/part-00002.parquet")
    code, out, _ = raydit("latents", "verify", path)
    assert code == 1 and "part-00002.parquet is missing" in out


@pytest.mark.slow
def test_the_job_itself_encodes_into_a_bucket(outputs, local_ray, capsys):
    _, there = outputs
    with StageContext(there) as context:
        dataset = encode(there, context=context)
        assert storage.exists(f"{there.output}/.lease.json")
    assert len(dataset) == 36 and all(check.ok for check in verify(dataset))
    names = storage.list_files(dataset.path, recursive=True)
    assert not [name for name in names if name.startswith(".")] and "manifest.json" in names
    assert not Path(there.output).exists()
