"""Latents of every autoencoder class: through Parquet, statistics, batches and back to images."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_recipe
from tiny_autoencoders import CHANNELS, SIDE, write_autoencoder
from tiny_encode import encode_here

from dit.autoencoder import Autoencoder, images_from_uint8
from dit.autoencoders.kinds import KINDS
from dit.checkpoint import save_checkpoint, step_name
from dit.flow import FlowMatching
from dit.formats.record import CheckpointRecord
from dit.model import DiT
from dit.train import create_state
from evaluation.protocol import EvaluationProtocol
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.samples import decode_moments, load_autoencoder, read_images
from pipelines.latents.show import show
from pipelines.latents.statistics import channel_statistics, channel_sums
from pipelines.latents.verify import verify
from pipelines.planning.encode_plan import make_encode_plan
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.networks import resolve_networks
from pipelines.planning.plan import Images, make_plan
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.training.data.batches import latent_batches
from pipelines.training.data.loading import open_latent_source
from pipelines.training.data.order import WorkerShare
from pipelines.training.settings import train_worker_settings
from raydit.errors import InvalidInput


def recipe_of(name, folder, *overrides):
    """The tiny recipe with a tiny autoencoder of a class; its model has one block."""
    write_autoencoder(name, folder / "pretrained")
    config = tiny_recipe(folder, "images.held_out=0.0", "encode.flip=true", "encode.shard_rows=16", *overrides)
    return replace(config, autoencoder=type(config.autoencoder)(id=str(folder / "pretrained")))


@pytest.fixture(scope="module", params=CHANNELS)
def encoded(request, tmp_path_factory):
    """Name of a class, the recipe, and the latents of the tiny images by its tiny autoencoder."""
    folder = tmp_path_factory.mktemp(request.param)
    config = recipe_of(request.param, folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return request.param, config, encode_here(config, monkeypatch)


def test_moments_are_those_of_the_autoencoder_and_readable_without_raydit(encoded):
    name, config, dataset = encoded
    manifest = json.loads((Path(dataset.path) / "manifest.json").read_text())
    deterministic = KINDS[name].deterministic
    assert manifest["moments_shape"] == [CHANNELS[name] * (1 if deterministic else 2), 4, 4]
    assert manifest.get("posterior") == ("deterministic" if deterministic else None)
    rows = pq.read_table(Path(dataset.path) / "part-00000.parquet").slice(0, 2).to_pylist()
    images = read_images(dataset, [row["key"] for row in rows])
    autoencoder = Autoencoder.load(config.autoencoder.id)
    for column, given in (("moments", images), ("moments_flip", images[:, :, ::-1])):
        stored = [np.frombuffer(row[column], "<f2").reshape(manifest["moments_shape"]) for row in rows]
        expected = autoencoder.encode(images_from_uint8(torch.from_numpy(given.copy()))).numpy()
        np.testing.assert_allclose(np.stack(stored), expected, atol=2e-3, rtol=2e-3)


def test_scale_and_posterior_are_where_the_format_says(encoded):
    name, config, dataset = encoded
    manifest = json.loads((Path(dataset.path) / "manifest.json").read_text())
    metadata = json.loads(pq.read_schema(Path(dataset.path) / "part-00000.parquet").metadata[b"raydit"])
    assert not {"scale", "posterior"} & manifest["autoencoder"].keys()
    if name == "AutoencoderKL":
        assert not {"scale", "posterior"} & manifest.keys() and len(manifest["autoencoder"]["latents_mean"]) == 4
    else:
        shape = {"AutoencoderKLFlux2": (16,), "AutoencoderDC": (8,), "AutoencoderRAE": (64, 4, 4)}[name]
        assert np.shape(manifest["scale"]["mean"]) == np.shape(manifest["scale"]["std"]) == shape
        # A value for each position is megabytes of text for a large autoencoder.
        assert ("scale" in metadata) == (len(shape) == 1)
    shared = metadata.keys() & manifest.keys() - {"autoencoder"}
    assert {key: metadata[key] for key in shared} == {key: manifest[key] for key in shared}
    assert train_worker_settings(config, dataset).scale == Autoencoder.load(config.autoencoder.id).scale


def test_the_data_set_is_whole(encoded):
    _, _, dataset = encoded
    wrong = [check for check in verify(dataset, sample=4) if not check.ok]
    assert not wrong


def test_a_data_set_is_shown_in_lines_of_a_reasonable_length(encoded):
    name, _, dataset = encoded
    lines = dict(show(dataset, None))
    assert ("deterministic" in lines["moments"]) == KINDS[name].deterministic
    assert ("in 64 channels" in lines["mean"]) == (name == "AutoencoderRAE")


def test_statistics_are_those_of_the_posterior(encoded):
    name, _, dataset = encoded
    moments = dataset.arrays.moments.astype(np.float64)
    mean = moments[:, : CHANNELS[name]]
    variance = 0.0 if KINDS[name].deterministic else np.exp(np.clip(moments[:, CHANNELS[name] :], -30, 20))
    total = mean.var(axis=(0, 2, 3)) + np.mean(variance + np.zeros_like(mean), axis=(0, 2, 3))
    np.testing.assert_allclose(dataset.statistics["latents_mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dataset.statistics["latents_std"], np.sqrt(total), rtol=1e-9)


def test_sums_of_deterministic_moments_add_up_over_shards():
    moments = np.random.default_rng(0).normal(2.0, 3.0, (10, 3, 2, 2)).astype(np.float16)
    parts = [channel_sums(part, deterministic=True) for part in np.split(moments, [1, 4])]
    found = channel_statistics(parts)
    values = moments.astype(np.float64)
    np.testing.assert_allclose(found["latents_mean"], values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["latents_std"], values.std(axis=(0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("backend", ["memory", "memmap", "stream"])
def test_training_batches_are_the_scaled_latents(encoded, backend, monkeypatch, tmp_path):
    """Deterministic ones without noise; the flow's own noise is that of any other latents of the shape."""
    monkeypatch.setenv("RAYDIT_CACHE", str(tmp_path))
    name, config, dataset = encoded
    scale = train_worker_settings(config, dataset).scale
    source = open_latent_source(dataset, backend, seed=0, shuffle_rows=16)
    assert source.latent_shape == dataset.latent_shape == (CHANNELS[name], 4, 4)
    batches = latent_batches(
        source, FlowMatching(), scale=scale, null_class=None, dropout=0.0, seed=0, share=WorkerShare(0, 1, 4),
        first_batch=0, random="counter",
    )  # fmt: skip
    batch = next(islice(batches, 1))
    assert batch.latents.shape == batch.noise.shape == (4, CHANNELS[name], 4, 4)
    if KINDS[name].deterministic:
        stored = dataset.arrays
        candidates = [scale.scale(torch.from_numpy(each[batch.rows.numpy()]).float()) for each in
                      (stored.moments, stored.moments_flip)]  # fmt: skip
        for i, latents in enumerate(batch.latents):
            assert any(torch.equal(latents, candidate[i]) for candidate in candidates)


def test_moments_decode_to_the_reconstruction(encoded):
    _, _, dataset = encoded
    autoencoder = load_autoencoder(dataset, download=False)
    decoded = decode_moments(autoencoder, dataset.arrays.moments[:2])
    assert decoded.shape == (2, SIDE, SIDE, 3)
    channels = dataset.latent_shape[0]
    means = torch.from_numpy(dataset.arrays.moments[:2, :channels]).float()
    assert np.array_equal(decoded, autoencoder.decode(autoencoder.scale.scale(means)).numpy())


def test_a_checkpoint_of_these_latents_samples_and_reconstructs(encoded, tmp_path):
    name, config, dataset = encoded
    settings = train_worker_settings(config, dataset)
    torch.manual_seed(0)
    checkpoint = save_checkpoint(
        create_state(DiT(settings.model), config.train), tmp_path / step_name(0), settings.record, {}
    )
    record = CheckpointRecord.from_dict(json.loads((checkpoint.path / "config.json").read_text()))
    assert record.autoencoder.scale == settings.scale
    protocol = EvaluationProtocol(
        num_samples=10, sampler="euler", sampling_steps=2, decoder="", extractor="", extractor_sha256="",
        reference_digest="",
    )  # fmt: skip
    sampler = CheckpointSampler(checkpoint.path, protocol, batch_size=2)
    assert sampler.sample([0, 1], np.array([0, 1])).shape == (2, SIDE, SIDE, 3)
    rows = dataset.arrays
    keys = [row["key"] for row in pq.read_table(Path(dataset.path) / "part-00000.parquet").slice(0, 2).to_pylist()]
    decoded = decode_moments(sampler.autoencoder, rows.moments[:2])
    difference = sampler.reconstruct(read_images(dataset, keys)).astype(int) - decoded
    assert np.abs(difference).max() <= 2  # of float16


def test_plans_know_the_moments_and_the_network(encoded, monkeypatch):
    monkeypatch.setattr("pipelines.planning.encode_plan.MEASURED_SECONDS", 0.0)
    name, config, dataset = encoded
    plan = make_encode_plan(replace(config, output=config.output + "-other"))
    assert plan.moments_shape == dataset.moments_shape
    networks = resolve_networks(config, num_classes=3)
    assert networks.model.in_channels == CHANNELS[name] and networks.model.latent_size == (4, 4)
    images = Images(training=10, held_out=0, classes=3, source="as told")
    planned = make_plan(config, parse_cluster("1xH100"), images)
    assert planned.latent_bytes == 10 * 2 * 2 * np.prod(dataset.moments_shape)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("AutoencoderRAE", 20, "found 20, expected 16, the only size"), ("AutoencoderKLFlux2", 20, "a multiple of 8")],
)
def test_images_of_a_size_that_does_not_fit_are_refused_before_anything_is_written(
    name, size, message, tmp_path, monkeypatch
):
    config = recipe_of(name, tmp_path, f"images.size={size}")
    with pytest.raises(InvalidInput, match=message):
        encode_here(config, monkeypatch)
    assert not Path(config.latents).exists()
    with pytest.raises(InvalidInput, match=message):
        resolve_networks(config, num_classes=3)


def test_a_manifest_with_an_unknown_posterior_is_refused(encoded, tmp_path):
    _, _, dataset = encoded
    manifest = {**dataset.manifest, "posterior": "none"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match="posterior is 'none'"):
        LatentDataset.open(tmp_path)
