"""A digest names what is used: weights, records and latents that were replaced under it are refused where they are."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_output, write_checkpoint
from tiny_story import write_latents

from cluster import storage
from dit.checkpoint import load_checkpoint
from dit.files import sha256_once
from dit.formats.completion import write_completion
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.verify import check_digests
from pipelines.registry.model_files import gather
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from raydit.errors import InvalidInput

CHANGED = "the file changed after it was written"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_output(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def written(config):
    return write_checkpoint(config, 2)


@pytest.fixture
def output(config, written, tmp_path):
    return shutil.copytree(config.output, tmp_path / "output")


@pytest.fixture
def folder(output):
    return output / "checkpoints" / "step_0000002"


def put_zeros(file: Path) -> None:
    """Replace all weights by zeros; neither length nor time of the file tell."""
    before = file.stat()
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_replaced_weights_neither_sample_nor_export_nor_are_promoted(folder, raydit, tmp_path):
    opened = open_checkpoint(folder)
    opened.weights()  # the digest of the right file is known to this process
    put_zeros(folder / "ema.safetensors")
    with pytest.raises(InvalidInput, match=f"ema.safetensors: {CHANGED}"):
        opened.weights()
    with pytest.raises(InvalidInput, match=f"ema.safetensors: {CHANGED}"):
        gather(opened, tmp_path / "model")
    for command in (("sample", "--out", "grid.png"), ("export", "exported", "--format", "official")):
        code, _, err = raydit(command[0], str(folder), *command[1:])
        assert code == 2 and CHANGED in err
    assert opened.weights("raw")


def test_a_file_is_hashed_again_only_after_it_has_changed(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr("dit.files.sha256_of", lambda path: hashed.append(path) or "0" * 64)
    file = folder / "model.safetensors"
    for _ in range(3):
        sha256_once(file)
    put_zeros(file)
    sha256_once(file)
    assert hashed == [file, file]


def test_a_replaced_record_or_state_is_refused(folder):
    (folder / "trainer" / "state.json").write_text("{}")
    opened = open_checkpoint(folder)
    for checkpoint in (opened, load_checkpoint(folder)):
        with pytest.raises(InvalidInput, match=f"state.json: {CHANGED}"):
            checkpoint.trainer_state  # noqa: B018
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "seed": 5}))
    for use in (open_checkpoint, load_checkpoint):
        with pytest.raises(InvalidInput, match=f"config.json: {CHANGED}"):
            use(folder)


def test_weights_that_complete_does_not_list_are_not_loaded(folder):
    shutil.copy(folder / "model.safetensors", folder / "ema_0.05.safetensors")
    with pytest.raises(InvalidInput, match="ema_0.05.safetensors: found a file that COMPLETE does not list"):
        open_checkpoint(folder).weights("ema_0.05")


@pytest.mark.parametrize("name", ["../private", "/etc/passwd", "a/../../b", "a\\..\\..\\b", "", "x\n", "s3://b/x"])
def test_complete_lists_files_of_its_own_folder_only(folder, name):
    (folder.parent / "private").write_text("secret")
    complete = folder / "COMPLETE"
    complete.write_text(json.dumps({**json.loads(complete.read_text()), name: "0" * 64}))
    for use in (lambda: open_checkpoint(folder), lambda: CheckpointFolder(str(folder.parent)).describe(2)):
        with pytest.raises(InvalidInput, match="COMPLETE: found .* expected names of files in its own folder"):
            use()


@pytest.mark.parametrize("content", ["[]", "{", '{"config.json": 5}', "[" * 100_000, '"x"'])
def test_what_is_no_list_of_digests_is_refused(folder, content):
    (folder / "COMPLETE").write_text(content)
    with pytest.raises(InvalidInput, match="COMPLETE: found no digests"):
        open_checkpoint(folder)


def test_a_replaced_copy_of_a_bucket_is_refused(folder, s3_bucket, cache):
    """The copy in the cache is used again because its folder exists, so its files are held against its record."""
    uri = f"{s3_bucket}/checkpoints/step_0000002"
    storage.publish_folder(str(shutil.copytree(folder, folder.with_name("sent"))), uri, last="COMPLETE")
    assert open_checkpoint(uri).weights()
    put_zeros(Path(open_checkpoint(uri).path) / "ema.safetensors")
    with pytest.raises(InvalidInput, match=CHANGED):
        open_checkpoint(uri).weights()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files that belong to another user")
def test_a_cache_that_another_user_made_is_not_used(folder, s3_bucket, cache):
    uri = f"{s3_bucket}/checkpoints/step_0000002"
    storage.publish_folder(str(shutil.copytree(folder, folder.with_name("sent"))), uri, last="COMPLETE")
    planted = open_checkpoint(uri).path.parent
    os.chown(planted, 12345, -1)
    ours = open_checkpoint(uri).path
    assert ours.parent != planted and ours.parent.name == "fetched-user-0" and open_checkpoint(uri).path == ours


def test_replaced_latents_are_found_before_a_training(config, output, raydit, tmp_path):
    """Same length, other moments. With --verify all shards are read, without it some that change from run to run."""
    moved = tiny_output(tmp_path / "other")
    latents = write_latents(moved)
    shard = Path(latents.path) / latents.shards[-1].file
    check_digests(latents)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for count in (None, len(latents.shards)):
        with pytest.raises(InvalidInput, match=f"{shard.name}: found sha256 .* according to the manifest"):
            check_digests(LatentDataset.open(latents.path), count)
    check_digests(LatentDataset.open(latents.path), 0)


@pytest.mark.parametrize("name", ["../part-00000.parquet", "/etc/passwd", 5])
def test_a_manifest_lists_shards_of_its_own_folder_only(config, tmp_path, name):
    latents = write_latents(tiny_output(tmp_path / "other"))
    manifest = Path(latents.path) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][0]["file"] = name
    manifest.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="manifest.json: found .* expected names of files in its own folder"):
        LatentDataset.open(latents.path).shards  # noqa: B018


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1e300},
        {"rows": -1},
        {"shards": 5},
        {"shards": [{"file": "part-00000.parquet"}]},
        {"moments_shape": [8, -8, 8]},
        {"moments_shape": [10**9, 8, 8]},
        {"moments_shape": [8, 8.0, 8]},
        {"class_names": 5},
        {"quarantined": "many"},
    ],
)
def test_a_manifest_whose_claims_cannot_be_true_is_told(config, tmp_path, change):
    latents = write_latents(tiny_output(tmp_path / "other"))
    manifest = Path(latents.path) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(InvalidInput, match="manifest.json: found"):
        LatentDataset.open(latents.path)


@pytest.mark.parametrize(
    ("rows", "key", "found"), [(100_000, None, r"[\d,]+ rows of"), (None, "k" * 100_000, r"keys of [\d,]+ bytes")]
)
def test_a_shard_that_claims_more_than_its_bytes_is_refused(tmp_path, rows, key, found):
    """100,000 rows of nulls in some kilobytes; and one long key of all rows, kept once."""
    latents = write_latents(tiny_output(tmp_path / "other"))
    file, manifest = Path(latents.path) / latents.shards[0].file, Path(latents.path) / "manifest.json"
    content = json.loads(manifest.read_text()) | {"moments_shape": [2, 1, 1]}
    schema, count = pq.read_schema(file), rows or latents.shards[0].rows
    columns = {field.name: pa.nulls(count, field.type) for field in schema}
    columns["key"] = pa.array([key] * count) if key else columns["key"]
    pq.write_table(pa.table(columns, schema=schema), file, compression="none")
    content["shards"][0]["bytes"] = file.stat().st_size
    manifest.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=f"found {found}"):
        LatentDataset.open(latents.path).arrays  # noqa: B018


def test_credentials_are_not_sent_to_a_server_that_somebody_elses_checkpoint_names(
    folder, s3_bucket, cache, monkeypatch, capsys
):
    """MLflow sends them to any server. The user's own checkpoints, and servers that the user names, are trusted."""
    server = "http://127.0.0.1:9"
    content = json.loads((folder / "config.json").read_text())
    content["recipe"]["tracking"] = {"uri": server}
    write_completion(folder, content)
    uri = f"{s3_bucket}/checkpoints/step_0000002"
    storage.publish_folder(str(shutil.copytree(folder, folder.with_name("sent"))), uri, last="COMPLETE")
    theirs, ours = open_checkpoint(uri), open_checkpoint(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert checkpoint_recipe(theirs).tracking.uri == server
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    assert checkpoint_recipe(theirs).tracking.uri == ""
    assert f"--set tracking.uri={server}" in capsys.readouterr().out
    assert checkpoint_recipe(ours).tracking.uri == server
    assert checkpoint_recipe(theirs, ("tracking.uri=http://127.0.0.1:8",)).tracking.uri == "http://127.0.0.1:8"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server}/")
    assert checkpoint_recipe(theirs).tracking.uri == server
