"""A training that starts from a U-ViT: fields of its recipe, fields of the start, and trainings of earlier commits."""

from pathlib import Path

import pytest
from tiny_training import Training, assert_equal, training_recipe

from dit.config import UViTConfig
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.training.starting import training_start as starting
from raydit.errors import InvalidInput

UVIT = {"architecture": "uvit", "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The recipe of a finished training of a U-ViT whose optional fields are all other than the defaults."""
    model = {**UVIT, "qkv_bias": True, "mlp_time_embed": True, "final_conv": False}
    return Training(training_recipe(tmp_path_factory.mktemp("base"), model=model, steps=3)).run().recipe


@pytest.fixture
def fine_tune(base, tmp_path):
    """Return a function that makes the recipe of a training from the base. fields: further ones of [model]."""

    def make(name, **fields):
        start = {"checkpoint": str(newest(base).path)}
        shared = {"encode": {"output": base.latents}, "start": start}
        return training_recipe(Path(base.output).parent, tmp_path / name, model={**UVIT, **fields}, **shared)

    return make


def newest(recipe):
    return CheckpointFolder(recipe.folder("checkpoints")).newest()


def test_fields_that_the_recipe_leaves_out_are_those_of_the_start(base, fine_tune):
    recipe = Training(fine_tune("tuned", qkv_bias=True)).run().recipe
    trained = newest(recipe).record.model_config
    assert isinstance(trained, UViTConfig) and trained == newest(base).record.model_config
    assert (trained.qkv_bias, trained.mlp_time_embed, trained.final_conv) == (True, True, False)


@pytest.mark.parametrize("field, value", [("qkv_bias", False), ("mlp_time_embed", False), ("final_conv", True)])
def test_another_value_than_that_of_the_start_is_refused_by_its_name(fine_tune, field, value):
    recipe = fine_tune("refused", **{field: value})
    with pytest.raises(
        InvalidInput, match=rf"model\.{field}: found {value}, expected {not value}, as in the checkpoint"
    ):
        Training(recipe).run()
    assert not CheckpointFolder(recipe.folder("checkpoints")).has_any()


def test_a_training_that_earlier_commits_began_with_the_value_of_the_start_resumes(base, fine_tune, monkeypatch):
    """They took it without a word, and record the model as it was trained beside the recipe with the other value."""
    whole = Training(fine_tune("whole", qkv_bias=True)).run()
    with monkeypatch.context() as earlier:
        earlier.setattr(starting, "_chosen_fields", lambda *_: [])
        Training(fine_tune("parts", qkv_bias=False)).run(stop_after=4)
    resumed = fine_tune("parts", qkv_bias=False)
    assert newest(resumed).step < 8 and newest(resumed).record.recipe["model"]["qkv_bias"] is False
    assert_equal(Training(resumed).run().weights, whole.weights)
    assert newest(resumed).record.model_config == newest(base).record.model_config
    with pytest.raises(InvalidInput, match="model.final_conv: found True"):
        Training(fine_tune("parts", qkv_bias=False, final_conv=True)).run()
