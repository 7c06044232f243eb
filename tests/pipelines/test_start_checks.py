"""What `raydit run` checks of the checkpoint that a training starts from, before any stage works."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import Training, training_recipe

from dit.autoencoder import create_autoencoder, save_autoencoder
from dit.autoencoders.latent_scale import LatentScale
from dit.formats.completion import write_completion
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.reader import resolved
from pipelines.config.recipe import AutoencoderConfig
from pipelines.config.start import StartConfig
from pipelines.images.open import open_source
from pipelines.planning.networks import resolve_networks
from pipelines.training.starting.check_start import check_start
from raydit.errors import InvalidInput, NotFound

UVIT = {"architecture": "uvit", "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The recipe of a finished training of a U-ViT whose optional fields are all other than the defaults."""
    model = {**UVIT, "qkv_bias": True, "mlp_time_embed": True, "final_conv": False}
    return Training(training_recipe(tmp_path_factory.mktemp("base"), model=model, steps=3)).run().recipe


def fine_tuning(base, output, autoencoder=None, reset=("labels",)):
    """The recipe of a training from the base. autoencoder: folder of another one than the base's."""
    start = {"checkpoint": str(CheckpointFolder(base.folder("checkpoints")).newest().path), "reset": list(reset)}
    recipe = training_recipe(Path(base.output).parent, output, model=UVIT, start=start)
    id = str(autoencoder or recipe.autoencoder.id)
    return replace(recipe, autoencoder=replace(recipe.autoencoder, id=id))


def train_autoencoder(recipe):
    """Return the recipe with settings to train an autoencoder, in place of the pretrained one."""
    train = AutoencoderTrainConfig(latent_channels=4, downsample=2)
    return replace(recipe, autoencoder=AutoencoderConfig(train=train))


def check(recipe, *, own_autoencoder=False, verify=False):
    class_names = open_source(recipe.images).listing().class_names
    model = resolve_networks(recipe, len(class_names)).model
    check_start(recipe, model, class_names, own_autoencoder=own_autoencoder, verify=verify)


def test_fields_of_a_uvit_that_the_recipe_leaves_out_may_be_those_of_the_start(base, tmp_path):
    check(fine_tuning(base, tmp_path / "tuned"))


def test_a_start_that_was_trained_on_latents_of_another_autoencoder_is_refused(base, tmp_path):
    torch.manual_seed(1)
    other = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    save_autoencoder(other, tmp_path / "other", LatentScale((0.0,) * 4, (1.0,) * 4))
    with pytest.raises(InvalidInput, match=r"trained on latents of the autoencoder '.*autoencoder'.*'.*other'"):
        check(fine_tuning(base, tmp_path / "tuned", tmp_path / "other"))
    both_ends = ("labels", "embedding", "final")  # are learned anew
    check(fine_tuning(base, tmp_path / "tuned", tmp_path / "other", reset=both_ends))


def test_a_start_is_refused_before_another_autoencoder_is_trained(base, tmp_path):
    recipe = train_autoencoder(fine_tuning(base, tmp_path / "tuned"))
    with pytest.raises(InvalidInput, match=r"with a recipe that trains another one.*Replace \[autoencoder.train\]"):
        check(recipe, own_autoencoder=True)
    both_ends = ("labels", "embedding", "final")
    check(train_autoencoder(fine_tuning(base, tmp_path / "tuned", reset=both_ends)), own_autoencoder=True)


def test_a_start_whose_recipe_trained_the_same_autoencoder_may_fit(base, tmp_path):
    recipe, start = train_autoencoder(fine_tuning(base, tmp_path / "tuned")), tmp_path / "start"
    shutil.copytree(recipe.train.start.checkpoint, start)
    config = json.loads((start / "config.json").read_text())
    config["recipe"]["autoencoder"] = resolved(recipe)["autoencoder"]
    write_completion(start, config)
    settings = replace(recipe.train.start, checkpoint=str(start))
    check(replace(recipe, train=replace(recipe.train, start=settings)), own_autoencoder=True)


def test_a_file_of_weights_that_is_missing_is_refused_before_an_autoencoder_is_trained(base, tmp_path):
    recipe = train_autoencoder(fine_tuning(base, tmp_path / "tuned"))
    start = StartConfig(checkpoint=str(tmp_path / "nothing.pt"), model="DiT-S/8")
    with pytest.raises(NotFound, match="no checkpoint at .*nothing.pt"):
        check(replace(recipe, train=replace(recipe.train, start=start)), own_autoencoder=True)


def test_damaged_weights_are_refused_before_images_are_encoded(base, tmp_path):
    recipe, start = fine_tuning(base, tmp_path / "tuned"), tmp_path / "start"
    shutil.copytree(recipe.train.start.checkpoint, start)
    content = bytearray((start / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (start / "ema.safetensors").write_bytes(content)
    recipe = replace(recipe, train=replace(recipe.train, start=replace(recipe.train.start, checkpoint=str(start))))
    check(recipe)
    with pytest.raises(InvalidInput, match="ema.safetensors.*changed after it was written"):
        check(recipe, verify=True)
