"""Autoencoders by hub id and revision, in caches as huggingface_hub lays them out; nothing is downloaded."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit.autoencoder import create_autoencoder, describe_autoencoder, locate_autoencoder, record_autoencoder
from dit.hub import split_revision
from pipelines.images.sources.huggingface import is_hub_id
from pipelines.latents.autoencoder import AutoencoderHandle
from raydit.errors import NotFound

NAME = "someone/vae"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Return a cache with two versions of an autoencoder: OLD, which the tag v1 names, and NEW, the branch main."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--someone--vae"
    (repository / "refs").mkdir(parents=True)
    for seed, (commit, revision) in enumerate(((OLD, "v1"), (NEW, "main"))):
        torch.manual_seed(seed)
        module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
        module.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    return cache


@pytest.fixture
def cache(versions, monkeypatch):
    from huggingface_hub import constants

    # What HF_HOME and HF_HUB_OFFLINE set, which are read when the library is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(versions))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return versions / "models--someone--vae"


@pytest.mark.parametrize(
    ("id", "commit"),
    [(NAME, NEW), (f"{NAME}@main", NEW), (f"{NAME}@v1", OLD), (f"{NAME}@{OLD}", OLD), (f"{NAME}@{NEW}", NEW)],
)
def test_a_revision_chooses_the_version(cache, id, commit):
    folder = cache / "snapshots" / commit
    assert locate_autoencoder(id, download=False) == folder
    record = record_autoencoder(id, 4)
    assert (record["id"], record["sha256"]) == (id, describe_autoencoder(folder)["sha256"])
    # The identity of latents is the digest of the weights, however they are named.
    assert AutoencoderHandle(id, "out").describe() == {"id": id, **describe_autoencoder(folder)}


def test_the_versions_differ(cache):
    digests = {describe_autoencoder(cache / "snapshots" / commit)["sha256"] for commit in (OLD, NEW)}
    assert len(digests) == 2


def test_workers_read_the_version_that_was_found_after_a_branch_has_moved(cache):
    handle = AutoencoderHandle(f"{NAME}@v1", "out")
    for_workers = handle.with_absolute_paths()
    assert for_workers.id == f"{NAME}@{OLD}"
    (cache / "refs" / "v1").write_text(NEW)
    try:
        assert handle.folder().name == NEW
        assert for_workers.folder().name == OLD
    finally:
        (cache / "refs" / "v1").write_text(OLD)


def test_a_folder_whose_name_has_an_at_is_no_revision(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    module.save_pretrained(f"{NAME}@v1")
    handle = AutoencoderHandle(f"{NAME}@v1", "out")
    assert handle.folder() == Path(f"{NAME}@v1").absolute()
    assert handle.with_absolute_paths().id == str(tmp_path / f"{NAME}@v1")
    assert record_autoencoder(f"{NAME}@v1", 4)["id"] == str(tmp_path / f"{NAME}@v1")


@pytest.mark.parametrize("revision", ["", "v2", "c" * 40, "v1/../main", "v1@main"])
def test_another_revision_is_refused(cache, revision):
    with pytest.raises(NotFound, match=f"no autoencoder at '{NAME}@{revision}'"):
        locate_autoencoder(f"{NAME}@{revision}", download=False)


def test_a_path_out_of_the_cache_is_no_revision(cache):
    (cache.parent / "secret").write_text(NEW)  # models--someone--vae/refs/../../secret
    for path in ("../../secret", str(cache.parent / "secret")):
        assert split_revision(f"{NAME}@{path}") == (f"{NAME}@{path}", None)
        assert not is_hub_id(f"{NAME}@{path}")
        with pytest.raises(NotFound):
            locate_autoencoder(f"{NAME}@{path}", download=False)
    assert is_hub_id(f"{NAME}@v1.0/rc-1") and split_revision(f"{NAME}@v1.0/rc-1") == (NAME, "v1.0/rc-1")


def test_stable_diffusions_autoencoder_is_known_by_any_revision(cache):
    record = record_autoencoder(f"stabilityai/sd-vae-ft-ema@{OLD}", 4)
    assert (record["id"], record["sha256"]) == (f"stabilityai/sd-vae-ft-ema@{OLD}", None)


def test_reading_an_id_imports_neither_torch_nor_the_hub():
    script = "import sys, dit.hub; print('torch' in sys.modules, 'huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_no_wrong_id(monkeypatch, number):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number), "/cache")

    monkeypatch.setattr("dit.autoencoder.fetch_snapshot", fail)
    with pytest.raises(OSError, match="/cache") as raised:
        locate_autoencoder("somebody/vae")
    assert raised.value.errno == number and not isinstance(raised.value, NotFound)
