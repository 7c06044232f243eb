"""From images of digits to a report, with a tiny untrained autoencoder of each class; on real engines."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_autoencoders import CHANNELS, write_autoencoder

from pipelines.config.reader import load_recipe
from pipelines.encode import encode
from pipelines.run import run_pipeline

pytestmark = pytest.mark.slow
DIGITS = Path(__file__).resolve().parents[2] / "pipelines" / "recipes" / "digits.toml"
SHORT = (
    "model.hidden_size=32",
    "model.depth=1",
    "model.num_heads=2",
    "train.steps=4",
    "train.warmup_steps=1",
    "train.checkpoint_every=4",
    "train.validate_every=4",
    "train.sample_every=4",
    "train.log_every=2",
    "evaluate.num_samples=20",
    "evaluate.sampling_steps=2",
    "evaluate.shard_rows=10",
    "evaluate.num_workers=1",
)


def recipe_of(name, folder, *overrides):
    """The digits recipe with a tiny autoencoder of a class for 32x32 images, and few steps."""
    if not (folder / "pretrained").exists():
        write_autoencoder(name, folder / "pretrained", side=32)
    places = (f"output={folder / 'output'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}")
    config = load_recipe(DIGITS, (*SHORT, *places, *overrides))
    return replace(config, autoencoder=type(config.autoencoder)(id=str(folder / "pretrained")))


@pytest.mark.parametrize("name", CHANNELS)
def test_digits_are_encoded_trained_on_and_scored(name, tmp_path, local_ray):
    report = run_pipeline(recipe_of(name, tmp_path))
    assert report is not None and report.metrics["fd_efficientnet_lite0_20"] > 0
    manifest = json.loads((tmp_path / "output" / "latents" / "manifest.json").read_text())
    described = json.loads((tmp_path / "output" / "checkpoints" / "step_0000004" / "config.json").read_text())
    assert described["model"]["in_channels"] == CHANNELS[name]
    assert described["autoencoder"].get("scale") == manifest.get("scale")


@pytest.mark.parametrize("name", CHANNELS)
def test_latents_and_statistics_are_equal_to_the_bit_on_any_number_of_workers(name, tmp_path, local_ray):
    found = []
    for workers in (1, 2, 3):
        places = (f"output={tmp_path / str(workers)}", f"encode.num_workers={workers}", "encode.shard_rows=128")
        dataset = encode(recipe_of(name, tmp_path, *places))
        found.append((dataset.statistics, dataset.fingerprint, [shard.sha256 for shard in dataset.shards]))
    assert found[0] == found[1] == found[2] and np.all(np.array(found[0][0]["latents_std"]) > 0)
