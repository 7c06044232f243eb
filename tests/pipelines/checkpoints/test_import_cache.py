"""Weights of other projects are imported again where their autoencoder is another one."""

import json
import shutil

import pytest
import torch
from tiny_checkpoint import random_network

from dit.autoencoder import LatentScale, create_autoencoder, save_autoencoder
from dit.checkpoint import export_diffusers
from dit.formats.diffusers_files import find_weights
from pipelines.checkpoints.adapters import base_record
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import open_checkpoint

GIVEN = ("model.num_heads=2", "autoencoder.id=vae")


def save_vae(folder, seed, scale=1.0):
    torch.manual_seed(seed)
    autoencoder = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    shutil.rmtree(folder, ignore_errors=True)
    save_autoencoder(autoencoder, folder, LatentScale((0.0,) * 4, (scale,) * 4))
    return find_weights(folder).sha256


@pytest.fixture
def projects(tmp_path, monkeypatch):
    """Two projects, each with an autoencoder vae/ of its own, and weights that both use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = random_network(0)
    torch.save(dict(network.state_dict()) | {"pos_embed": network.pos_embed.data}, tmp_path / "w.pt")
    folders = tmp_path / "a", tmp_path / "b"
    return {folder: save_vae(folder / "vae", seed) for seed, folder in enumerate(folders)}


def test_a_relative_folder_is_that_of_the_working_directory(projects, tmp_path, monkeypatch):
    for folder, sha256 in projects.items():
        monkeypatch.chdir(folder)
        opened = open_checkpoint(tmp_path / "w.pt", overrides=GIVEN)
        assert opened.record.autoencoder.sha256 == sha256
        assert checkpoint_autoencoder(opened) == folder / "vae"
        monkeypatch.chdir(tmp_path)  # where a worker runs
        assert open_checkpoint(opened.shared).path == opened.path
        options = {"overrides": GIVEN}
        monkeypatch.chdir(folder)
        assert base_record(opened, "raw", **options)["imported"] == opened.imported
    assert opened.imported["overrides"][-1] == f'autoencoder.id="{folder / "vae"}"'


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_replaced_autoencoder_is_recorded_anew(projects, tmp_path, monkeypatch, pipeline):
    monkeypatch.chdir(tmp_path / "a")
    name, overrides, vae = tmp_path / "w.pt", GIVEN, tmp_path / "a" / "vae"
    first = open_checkpoint(name, overrides=overrides)
    if pipeline:
        name, overrides = tmp_path / "pipeline", ()
        export_diffusers(first, name, autoencoder=vae)
        shutil.rmtree(name / "vae")
        (name / "vae").symlink_to(vae)
        first = open_checkpoint(name)
    kept = vae.rename(tmp_path / "kept")
    sha256 = save_vae(vae, 7)
    again = open_checkpoint(name, overrides=overrides)
    assert (again.record.autoencoder.sha256, checkpoint_autoencoder(again).samefile(vae)) == (sha256, True)
    assert open_checkpoint(name, overrides=overrides).path == again.path != first.path
    shutil.rmtree(vae)
    kept.rename(vae)
    assert open_checkpoint(name, overrides=overrides).path == first.path


def test_another_scale_is_another_autoencoder(projects, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "a")
    first = open_checkpoint(tmp_path / "w.pt", overrides=GIVEN)
    config = json.loads((tmp_path / "a" / "vae" / "config.json").read_text())
    (tmp_path / "a" / "vae" / "config.json").write_text(json.dumps(config | {"latents_std": [3.0] * 4}))
    again = open_checkpoint(tmp_path / "w.pt", overrides=GIVEN)
    assert (first.record.autoencoder.latents_std, again.record.autoencoder.latents_std) == ((1.0,) * 4, (3.0,) * 4)


def test_an_import_from_before_a_download_stays(projects, tmp_path, monkeypatch):
    """Its digest is that of the reports on it. It records no autoencoder that another one could contradict."""
    known = {}
    monkeypatch.setattr("dit.autoencoder._cached", known.get)
    given = ("model.num_heads=2", "autoencoder.id=stabilityai/sd-vae-ft-mse")
    monkeypatch.setattr("dit.autoencoder.require_latent_size", lambda described, size: None)
    first = open_checkpoint(tmp_path / "w.pt", overrides=given)
    assert first.record.autoencoder.sha256 is None
    known["stabilityai/sd-vae-ft-mse"] = tmp_path / "a" / "vae"
    assert open_checkpoint(tmp_path / "w.pt", overrides=given).path == first.path


def test_an_import_opens_without_the_autoencoder_that_is_gone(projects, tmp_path):
    """Such as the base of an adapter, whose weights alone are read."""
    vae = tmp_path / "a" / "vae"
    given = ("model.num_heads=2", f"autoencoder.id={vae}")
    first = open_checkpoint(tmp_path / "w.pt", overrides=given)
    shutil.rmtree(vae)
    assert open_checkpoint(tmp_path / "w.pt", overrides=given).path == first.path
    vae.mkdir()
    assert open_checkpoint(tmp_path / "w.pt", overrides=given).path == first.path
