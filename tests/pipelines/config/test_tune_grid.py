"""The grid of a search: which combinations it has, and what their samples cost."""

import math
from dataclasses import replace

import pytest
from tiny import tiny_recipe

from pipelines.config.tune import TuneGrid, passes_per_sample
from raydit.errors import InvalidInput


def test_every_combination_is_there_once(tmp_path):
    grid = TuneGrid(cfg_scale=(1.0, 2.0), cfg_interval=(None, (0.2, 0.6)), weights=("ema", "raw"))
    found = [config.evaluate for config in grid.recipes(tiny_recipe(tmp_path))]
    named = [(each.cfg_scale, each.cfg_interval, each.weights) for each in found]
    assert len(set(named)) == len(named) == 6  # without guidance, an interval is none
    assert (1.0, (0.2, 0.6), "ema") not in named


def test_a_combination_that_cannot_be_sampled_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="sampling_steps"):
        list(TuneGrid(sampler=("sde",), sampling_steps=(25, 1)).recipes(tiny_recipe(tmp_path)))
    with pytest.raises(InvalidInput, match="ddpm"):
        list(TuneGrid(sampler=("ddpm",)).recipes(tiny_recipe(tmp_path)))


def test_a_sampler_goes_without_the_settings_of_another(tmp_path):
    config = tiny_recipe(tmp_path)
    noisy = replace(config.evaluate, sampler="sde", sde_diffusion="constant", sde_norm=0.5)
    found = [each.evaluate for each in TuneGrid(sampler=("euler", "sde")).recipes(replace(config, evaluate=noisy))]
    assert found == [replace(noisy, sampler="euler", sde_diffusion=None, sde_norm=None), noisy]


def test_a_search_of_scales_has_no_guide_at_scale_1(tmp_path):
    config = tiny_recipe(tmp_path)
    guided = replace(config.evaluate, cfg_scale=3.0, autoguidance="small", autoguidance_weights="raw")
    grid = TuneGrid(cfg_scale=(1.0, 2.0), weights=("ema", "raw"))
    found = [each.evaluate for each in grid.recipes(replace(config, evaluate=guided))]
    without = {"cfg_scale": 1.0, "autoguidance": None, "autoguidance_weights": None}
    expected = [
        replace(guided, **settings, weights=weights)
        for settings in (without, {"cfg_scale": 2.0})
        for weights in ("ema", "raw")
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("cfg_scale", value) for value in (0.5, math.nan, math.inf)),
        *(("cfg_interval", value) for value in ((0.2, math.inf), (math.nan, 0.8), (0.2,))),
        ("sampling_steps", 0),
        ("sampler", "eular"),
    ],
)
def test_a_value_that_no_recipe_may_have_is_refused(name, value):
    with pytest.raises(InvalidInput, match=rf"^evaluate\.{name}: found .*, expected "):
        TuneGrid(**{name: (value,)})


def test_an_interval_whose_ends_are_swapped_is_refused_where_there_is_guidance(tmp_path):
    grid = TuneGrid(cfg_scale=(1.0, 2.0), cfg_interval=((0.8, 0.2),))
    with pytest.raises(InvalidInput, match=r"cfg_interval: found \[0.8, 0.2\], expected \[low, high\]"):
        list(grid.recipes(tiny_recipe(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 10),
        ({"sampler": "heun"}, 20),
        ({"cfg_scale": 2.0}, 20),
        ({"cfg_scale": 2.0, "cfg_interval": (0.25, 0.75)}, 15),
        ({"cfg_scale": 2.0, "cfg_interval": (0.5, 2.0), "sampler": "heun"}, 30),
    ],
)
def test_a_sample_costs_its_passes(tmp_path, settings, expected):
    config = tiny_recipe(tmp_path)
    evaluate = replace(config.evaluate, **{"sampler": "euler", "sampling_steps": 10, "cfg_scale": 1.0} | settings)
    assert passes_per_sample(replace(config, evaluate=evaluate)) == pytest.approx(expected)
