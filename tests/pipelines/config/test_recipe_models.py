"""Which network a recipe's [model] gives, and which ones it refuses before any work."""

import dataclasses

import pytest

from dit.config import DiTConfig, UViTConfig, named_config
from pipelines.artifacts import differences
from pipelines.config.reader import RecipeError, validate_recipe

SIZES = {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}
LATENTS = {"input_size": (8, 6), "num_classes": 10}


def recipe(model: dict, **objective):
    """A valid recipe of flow matching, or of what `objective` says, around a [model] section."""
    objective = objective or {"kind": "flow"}
    sampler = "euler" if objective["kind"] == "flow" else "ddim"
    return validate_recipe(
        {
            "name": "small",
            "output": "out",
            "images": {"path": "digits", "size": 32},
            "autoencoder": {"id": "a"},
            "model": model,
            "objective": objective,
            "evaluate": {"sampler": sampler},
        }
    )


def network(model: dict, **objective) -> DiTConfig | UViTConfig:
    read = recipe(model, **objective)
    return read.model.resolve(**LATENTS, in_channels=4, learn_sigma=read.objective.learn_sigma)


def test_without_options_it_is_the_papers_dit():
    assert network(SIZES) == DiTConfig(**LATENTS, **SIZES, learn_sigma=False)
    assert network(SIZES, kind="diffusion") == DiTConfig(**LATENTS, **SIZES)


def test_the_refinements_of_dit_are_taken():
    options = {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "position": "rope", "head_width": 128, "head_depth": 2}
    assert network({**SIZES, **options}) == DiTConfig(**LATENTS, **SIZES, **options, learn_sigma=False)
    assert network({"name": "DiT-S/2", "mlp": "swiglu"}) == named_config(
        "DiT-S/2", **LATENTS, mlp="swiglu", learn_sigma=False
    )


def test_a_uvit_is_named_or_given_by_its_dimensions():
    assert network({"name": "U-ViT-S/2"}) == named_config("U-ViT-S/2", **LATENTS)
    given = {**SIZES, "architecture": "uvit", "class_dropout_prob": 0.0}
    assert network(given, kind="diffusion", variance="fixed_small") == UViTConfig(
        **LATENTS, **SIZES, class_dropout_prob=0
    )


def test_the_options_of_uvit_are_taken():
    options = {"qkv_bias": True, "mlp_time_embed": True, "final_conv": False}
    given = {**SIZES, "architecture": "uvit", **options}
    assert network(given) == UViTConfig(**LATENTS, **SIZES, **options)
    assert not network({"name": "U-ViT-H/2"}).final_conv
    assert network({"name": "U-ViT-H/2", "final_conv": True}) == named_config("U-ViT-H/2", **LATENTS, final_conv=True)


def test_options_left_out_make_no_other_artifact_of_an_earlier_training():
    before = {"name": None, **SIZES, "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "conditioning": "adaln_zero"}
    assert differences(before, dataclasses.asdict(recipe(SIZES).model)) == []


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ({**SIZES, "architecture": "uvit", "mlp": "swiglu"}, "model.mlp", "found 'swiglu' with a U-ViT, which has no"),
        ({**SIZES, "final_conv": False}, "model.final_conv", "with a DiT, which has no final_conv, expected a U-ViT"),
        ({"name": "U-ViT-S/2", "conditioning": "adaln"}, "model.conditioning", "Remove conditioning, or choose a DiT"),
        (
            {"name": "U-ViT-S/2", "architecture": "dit"},
            "model.name",
            "together with architecture = 'dit', expected only one",
        ),
        (
            {"name": "U-ViT-S/2", "head_width": 128, "head_depth": 1},
            "model.head_width",
            "U-ViT, which has no head_width",
        ),
        ({**SIZES, "head_width": 128}, "model.head_width", "is 128 without head_depth, expected both"),
        ({**SIZES, "head_width": 0, "head_depth": 1}, "model.head_width", "found 0"),
        ({"name": "U-ViT-S2"}, "model.name", "is 'U-ViT-S2', expected one of"),
        ({"name": "U-ViT-S2"}, "model.name", "did you mean 'U-ViT-S/2'?"),
        ({**SIZES, "architecture": "uvit", "depth": 3}, "model.depth", "is 3, expected an even number"),
        ({**SIZES, "num_heads": 16, "position": "rope"}, "model.position", "heads of width 2"),
        ({**SIZES, "norm": "rmsnorm"}, "model.norm", "found 'rmsnorm' (str), expected 'layer' or 'rms'"),
    ],
)
def test_models_that_contradict_themselves_are_refused(model, key, words):
    with pytest.raises(RecipeError) as error:
        recipe(model)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key}: ")
    assert words in line


@pytest.mark.parametrize("variance", [{}, {"variance": "learned_range"}])
def test_a_uvit_with_a_learned_variance_is_refused(variance):
    with pytest.raises(RecipeError) as error:
        recipe({"name": "U-ViT-S/2"}, kind="diffusion", **variance)
    (line,) = str(error.value).splitlines()
    assert line.startswith("objective.variance: found ")
    assert "does not learn sigma, expected 'fixed_small' or 'fixed_large'" in line
