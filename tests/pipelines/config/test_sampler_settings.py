"""Settings of the samplers in recipes: what fits together, and what training makes of its time shift."""

import pytest
from tiny import tiny_recipe

from dit.config import DiTConfig
from pipelines.cli.submission.paths import relative_recipe_paths
from pipelines.config.model import ObjectiveConfig
from pipelines.config.reader import RecipeError, resolved


@pytest.fixture
def recipe(tmp_path):
    return lambda *overrides: tiny_recipe(tmp_path, *overrides)


def test_a_recipe_may_set_all_of_them(recipe):
    evaluate = recipe(
        "evaluate.sampler=sde",
        "evaluate.sde_diffusion=constant",
        "evaluate.sde_norm=2",
        "evaluate.time_shift=dimension",
        "evaluate.cfg_interval=[0.3, 1]",
        "evaluate.cfg_scale=2.0",
        "evaluate.autoguidance=outputs/small/checkpoints/step_0001000",
        "evaluate.autoguidance_weights=raw",
    ).evaluate
    assert (evaluate.sde_diffusion, evaluate.sde_norm, evaluate.time_shift) == ("constant", 2.0, "dimension")
    assert (evaluate.cfg_interval, evaluate.needs_null_class) == ((0.3, 1.0), False)
    assert recipe("evaluate.sampler=dpmpp_2m", "evaluate.time_shift=3").evaluate.time_shift == 3.0


def test_none_of_them_is_recorded_unless_it_is_set(recipe):
    names = {"time_shift", "sde_diffusion", "sde_norm", "autoguidance", "autoguidance_model", "autoguidance_weights"}
    assert not names & resolved(recipe())["evaluate"].keys() and "time_shift" not in resolved(recipe())["objective"]
    assert resolved(recipe("evaluate.time_shift=sd3"))["evaluate"]["time_shift"] == "sd3"


DIFFUSION = ("objective.kind=diffusion", "evaluate.sampler=ddpm")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.sde_norm=2"], "evaluate.sde_norm: found 2.0 with sampler = 'euler', expected the sampler 'sde'"),
        (["evaluate.sampler=sde", "evaluate.sampling_steps=1"], "sampling_steps: found 1 with sampler = 'sde'"),
        (["evaluate.sampler=sde", "evaluate.sde_diffusion=linear"], "evaluate.sde_diffusion: found 'linear'"),
        (["evaluate.time_shift=sd4"], "evaluate.time_shift: found 'sd4'"),
        (["evaluate.time_shift=0"], "evaluate.time_shift: found 0"),
        ([*DIFFUSION, "evaluate.time_shift=3"], "evaluate.time_shift: found 3.0 with objective.kind = 'diffusion'"),
        ([*DIFFUSION, "objective.time_shift=3"], "objective.time_shift: found 3.0 with kind = 'diffusion'"),
        (["evaluate.cfg_interval=[200, 800]"], r"evaluate.cfg_interval: found \[200.0, 800.0\] with .* 'flow'"),
        (["evaluate.cfg_scale=1.0", "evaluate.autoguidance=x"], "evaluate.autoguidance: found 'x' with cfg_scale = 1"),
        (["evaluate.autoguidance_weights=raw"], "evaluate.autoguidance_weights: found 'raw' without autoguidance"),
        (["evaluate.autoguidance_model=DiT-S/2"], "evaluate.autoguidance_model: found 'DiT-S/2' without autoguidance"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*overrides)


def test_a_model_without_a_null_class_may_be_guided_by_another(recipe):
    overrides = ("model.class_dropout_prob=0", "evaluate.cfg_scale=2.0")
    with pytest.raises(RecipeError, match="or evaluate.autoguidance"):
        recipe(*overrides)
    assert recipe(*overrides, "evaluate.autoguidance=x").evaluate.cfg_scale == 2.0


@pytest.mark.parametrize(("rule", "factor"), [("sd3", 3.0), (2.5, 2.5), ("dimension", 0.25**0.5), ("flux", None)])
def test_training_gets_the_number_that_a_rule_gives(rule, factor):
    model = DiTConfig(input_size=16, in_channels=4, hidden_size=32, num_heads=2, depth=1)
    settings = ObjectiveConfig(kind="flow", time_shift=rule).settings(model)
    assert settings.keys() == {"time_shift"}
    assert settings["time_shift"] == pytest.approx(factor or 2.718281828 ** (0.5 + 0.65 * (64 - 256) / 3840))
    assert ObjectiveConfig(kind="flow").settings(model) == {}


def test_the_path_of_a_guide_is_that_of_the_machine_that_submits(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    guided = recipe("evaluate.cfg_scale=2.0", "evaluate.autoguidance=small")
    assert relative_recipe_paths(guided)["evaluate.autoguidance"] == "small"
    in_store = recipe("evaluate.cfg_scale=2.0", "evaluate.autoguidance=runs:/0123/step_0000001")
    assert "evaluate.autoguidance" not in relative_recipe_paths(in_store)
