"""Checkpoints of a recipe with relative paths are opened from any working directory."""

from pathlib import Path

import pytest
from tiny_training import Training, training_recipe

from dit.formats.completion import step_name
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from raydit.errors import NotFound


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder in which a training ran whose recipe names output and autoencoder relative to it."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    monkeypatch.chdir(folder)
    recipe = training_recipe(Path("runs/tiny"), steps=3)
    assert (recipe.output, recipe.autoencoder.id) == ("runs/tiny/output", "runs/tiny/autoencoder")
    Training(recipe).run()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def opened(project):
    return open_checkpoint(project / "runs" / "tiny" / "output" / "checkpoints" / step_name(3))


def test_the_autoencoder_is_found_where_the_recipe_ran_and_where_that_was_moved(trained, tmp_path):
    assert checkpoint_autoencoder(opened(trained)) == trained / "runs" / "tiny" / "autoencoder"
    moved = trained.rename(tmp_path / "moved")
    assert checkpoint_autoencoder(opened(moved)) == moved / "runs" / "tiny" / "autoencoder"


def test_another_autoencoder_there_or_an_output_that_was_moved_alone_is_refused(trained, tmp_path):
    alone = (trained / "runs" / "tiny" / "output").rename(tmp_path / "output")
    with pytest.raises(NotFound, match="no autoencoder at 'runs/tiny/autoencoder'"):
        checkpoint_autoencoder(open_checkpoint(alone / "checkpoints" / step_name(3)))
    alone.rename(trained / "runs" / "tiny" / "output")
    weights = trained / "runs" / "tiny" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(NotFound, match="no autoencoder at 'runs/tiny/autoencoder'"):
        checkpoint_autoencoder(opened(trained))


def test_extractors_that_are_given_take_the_place_of_the_recorded_one(trained):
    checkpoint = opened(trained)
    assert checkpoint_recipe(checkpoint).evaluate.extractor == "inception"
    several = checkpoint_recipe(checkpoint, ('evaluate.extractors=["efficientnet-lite1", "efficientnet-lite0"]',))
    assert several.evaluate.extractors == ("efficientnet-lite1", "efficientnet-lite0")
    checkpoint.record.recipe["evaluate"]["extractors"] = ["efficientnet-lite0", "efficientnet-lite1"]
    alone = checkpoint_recipe(checkpoint, ("evaluate.extractor=efficientnet-lite2",)).evaluate
    assert (alone.extractor, alone.extractors) == ("efficientnet-lite2", ())
