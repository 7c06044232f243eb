"""A sampler uses the weights that the protocol names, and the scale that the checkpoint was trained with."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dit.autoencoder import LatentScale, create_autoencoder, describe_autoencoder, save_autoencoder
from dit.checkpoint import save_checkpoint
from dit.config import DiTConfig
from dit.formats.completion import step_name
from dit.model import DiT
from dit.schedule import TrainingConfig
from dit.train import create_state
from evaluation.protocol import EvaluationProtocol
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.evaluate import EvaluateConfig
from pipelines.sample import sample_file
from pipelines.scoring.sample_grid import sample_grid
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.scoring.workers.actors import SampleActor
from raydit.errors import Failed, InvalidInput

MODEL = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2, "learn_sigma": False}
SCALE = LatentScale((1.0, 2.0, 3.0, 4.0), (0.5, 0.5, 2.0, 2.0))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose weights, and each of its averages, are a constant."""
    folder = tmp_path / "autoencoder"
    save_autoencoder(
        create_autoencoder(image_size=8, latent_channels=4, downsample=2, width=8),
        folder,
        LatentScale((0.0,) * 4, (1.0,) * 4),
    )
    described = {**describe_autoencoder(folder), "latents_mean": SCALE.mean, "latents_std": SCALE.std}
    state = create_state(DiT(DiTConfig(**MODEL)), TrainingConfig(steps=1, ema_sigma_rels=(0.05, 0.1)))
    fill(state.network.state_dict(), 0.0)
    for value, average in enumerate(state.averages.values(), start=1):
        fill(average.state_dict(), value)
    config = {"model": MODEL, "objective": {"kind": "flow"}, "autoencoder": {"id": str(folder), **described}}
    return save_checkpoint(state, tmp_path / "checkpoints" / step_name(0), config, {})


def fill(state, value):
    with torch.no_grad():
        for tensor in state.values():
            tensor.fill_(value)


def sampler(checkpoint, weights):
    protocol = EvaluationProtocol(
        num_samples=10,
        sampler="euler",
        sampling_steps=2,
        weights=weights,
        decoder="",
        extractor="",
        extractor_sha256="",
        reference_digest="",
    )
    return CheckpointSampler(checkpoint.path, protocol, batch_size=2)


@pytest.mark.parametrize(("weights", "value"), [("raw", 0.0), ("ema", 1.0), ("ema_0.05", 2.0), ("ema_0.1", 3.0)])
def test_the_sampler_loads_the_weights_that_the_protocol_names(checkpoint, weights, value):
    trained = [each for each in sampler(checkpoint, weights).model.named_parameters() if each[0] != "pos_embed"]
    assert all(bool((parameter == value).all()) for _, parameter in trained)  # averages share what is not trained


def test_an_average_that_the_checkpoint_lacks_is_refused_with_the_names_of_the_others(checkpoint):
    with pytest.raises(FileNotFoundError, match="no weights 'ema_0.2': found ema, ema_0.05, ema_0.1, model"):
        sampler(checkpoint, "ema_0.2")


def test_latents_are_unscaled_by_the_scale_that_the_checkpoint_was_trained_with(checkpoint):
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(sampler(checkpoint, "ema").autoencoder.scale.unscale(latents), SCALE.unscale(latents))


def test_a_grid_for_a_gpu_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidInput, match="no usable GPU on this machine.*Add --set evaluate.gpus_per_worker=0"):
        sample_grid("nowhere", EvaluateConfig(gpus_per_worker=1), 0, str(tmp_path / "a.png"), classes=None, columns=2)


def test_too_many_steps_are_refused_before_any_work(checkpoint, tmp_path):
    config = SimpleNamespace(evaluate=EvaluateConfig(sampler="ddpm", sampling_steps=1001))
    diffusion = replace(checkpoint, config=checkpoint.config | {"objective": {"kind": "diffusion"}})
    opened = LocatedCheckpoint.at(str(checkpoint.path), diffusion)
    message = "evaluate.sampling_steps: found 1001 .* expected at most 1000"
    with pytest.raises(InvalidInput, match=message):
        sample_grid(opened, config.evaluate, 0, str(tmp_path / "a.png"), classes=None, columns=2)
    with pytest.raises(InvalidInput, match=message):
        sample_file(opened, config, str(tmp_path / "a.npz"), num_samples=2)


def test_compiled_samples_need_a_compiler_before_anything_is_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("raydit.compilers.find_compiler", lambda gpu: None)
    compiled, grid = EvaluateConfig(compile=True), tmp_path / "grid.png"
    with pytest.raises(Failed, match="compile = true, and no"):
        SampleActor(compiled, [checkpoint])
    with pytest.raises(Failed, match="compile = true, and no"):
        sample_grid(checkpoint.path, compiled, 0, str(grid), classes=None, columns=1)
