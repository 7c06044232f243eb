"""What `raydit run` checks of the checkpoint that a training starts from, before any stage works."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import Training, training_recipe

from dit.autoencoder import create_autoencoder, save_autoencoder
from dit.autoencoders.latent_scale import LatentScale
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.images.open import open_source
from pipelines.run import check_start
from raydit.errors import InvalidInput

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


def check(recipe):
    check_start(recipe, open_source(recipe.images).listing(), own_autoencoder=False)


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
