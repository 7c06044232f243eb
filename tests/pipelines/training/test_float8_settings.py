"""train.matmul = "float8": what the recipe refuses, what a worker refuses, and the training's identity."""

from functools import partial

import pytest
from tiny_training import Training, assert_equal, training_recipe

from dit.float8 import use_float8
from pipelines.artifacts import differences
from pipelines.config.training import TrainConfig
from pipelines.latents.dataset import LatentDataset
from pipelines.training import loop
from pipelines.training.settings import train_worker_settings
from pipelines.training.starting.identity import train_identity
from raydit.errors import InvalidInput

FLOAT8 = {"matmul": "float8", "dtype": "bfloat16", "gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, "'float8' with dtype = 'float32', expected dtype = \"bfloat16\".*Set train.dtype"),
        ({"dtype": "tf32"}, "'float8' with dtype = 'tf32'"),
        ({"gpus_per_worker": 0}, "'float8' with gpus_per_worker = 0.*Set train.gpus_per_worker = 1"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(InvalidInput, match=f"matmul: found {message}"):
        TrainConfig(**{**FLOAT8, **settings})


def test_it_is_part_of_a_trainings_identity_only_where_it_is_set(tmp_path):
    plain, rounded = training_recipe(tmp_path), training_recipe(tmp_path, **FLOAT8)
    latents = LatentDataset.open(plain.latents)
    before, after = train_identity(plain, latents), train_identity(rounded, latents)
    assert differences(before, after) == ['train.dtype: null -> "bfloat16"', 'train.matmul: null -> "float8"']
    assert "matmul" not in before["train"]


def test_a_model_that_does_not_fit_is_refused_before_workers_start(tmp_path):
    narrow = {"patch_size": 2, "hidden_size": 24, "depth": 2, "num_heads": 2}
    recipe = training_recipe(tmp_path, model=narrow, **FLOAT8)
    with pytest.raises(InvalidInput, match="'float8' with a model of hidden_size = 24, expected a multiple of 16"):
        train_worker_settings(recipe, LatentDataset.open(recipe.latents))


def test_a_worker_without_the_card_refuses(tmp_path):
    training = Training(training_recipe(tmp_path, **FLOAT8))
    with pytest.raises(InvalidInput, match="'float8', and this worker computes on the CPU"):
        training.run()


def test_a_training_in_emulated_float8_is_close_to_bfloat16_and_resumes_to_the_bit(tmp_path, monkeypatch):
    pytest.importorskip("torchao", reason="needs torchao, of the extra fp8")
    monkeypatch.setattr(loop, "require_float8", lambda device: None)
    monkeypatch.setattr(loop, "use_float8", partial(use_float8, emulate=True))
    plain = Training(training_recipe(tmp_path, tmp_path / "plain", dtype="bfloat16")).run()
    whole = Training(training_recipe(tmp_path, tmp_path / "whole", **FLOAT8)).run()
    first = Training(training_recipe(tmp_path, tmp_path / "parts", **FLOAT8, steps=4)).run()
    rest = Training(training_recipe(tmp_path, tmp_path / "parts", **FLOAT8)).run()
    assert_equal(rest.weights, whole.weights)
    assert first.losses | rest.losses == whole.losses != plain.losses
    assert list(whole.losses.values()) == pytest.approx(list(plain.losses.values()), rel=0.05)
    assert any("without train.compile" in notice for notice in whole.notices) and not plain.notices
