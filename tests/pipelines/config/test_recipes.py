"""The recipes that come with raydit say what they mean; those that no test can run are resolved."""

from dataclasses import replace
from pathlib import Path

import pytest

from dit.macs import forward_macs
from pipelines.config.reader import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "pipelines" / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_named_after_its_file(path):
    config = load_recipe(path)
    assert (config.name, config.output) == (path.stem, f"outputs/{path.stem}")


PAPER_GMACS = {
    "imagenet256": 118.64,
    "imagenet256-dit-s2": 6.06,
    "imagenet256-dit-b2": 23.01,
    "imagenet256-dit-l2": 80.71,
    "imagenet256-dit-xl2": 118.64,
}


@pytest.mark.parametrize("name", PAPER_GMACS)
def test_imagenet_is_trained_as_in_the_paper(name):
    """Peebles & Xie 2022, section 4 and table 4: on 32x32x4 latents."""
    config = load_recipe(RECIPES / f"{name}.toml")
    learn_sigma = config.objective.learn_sigma
    model = config.model.resolve(input_size=32, in_channels=4, num_classes=1000, learn_sigma=learn_sigma)
    assert forward_macs(model) / 1e9 == pytest.approx(PAPER_GMACS[name], abs=0.05) and learn_sigma
    train = config.train
    assert (train.global_batch_size, train.learning_rate, train.ema_decay, train.warmup_steps) == (256, 1e-4, 0.9999, 0)
    assert (config.evaluate.num_samples, config.evaluate.sampler, config.evaluate.cfg_channels) == (50_000, "ddpm", 3)
    assert config.latents == load_recipe(RECIPES / "imagenet256.toml").latents


def test_the_512_pixel_model_is_that_of_the_paper():
    """Peebles & Xie 2022, table 3: on 64x64x4 latents, with the hyperparameters of 256 pixels."""
    config, smaller = (load_recipe(RECIPES / f"imagenet{size}-dit-xl2.toml") for size in (512, 256))
    model = config.model.resolve(input_size=64, in_channels=4, num_classes=1000, learn_sigma=True)
    assert forward_macs(model) / 1e9 == pytest.approx(524.60, abs=0.1)
    assert config.images.size == 512 and config.evaluate.cfg_scale == 1.5
    lengths = {"steps": config.train.steps, "keep_every": config.train.keep_every}
    assert config.train == replace(smaller.train, **lengths)


def test_the_recipe_of_sit_samples_by_its_papers_protocol():
    """Ma et al. 2024, section 4: trained as DiT, 250 steps of Euler-Maruyama with the diffusion sigma."""
    config, dit = (load_recipe(RECIPES / f"imagenet256-{name}-xl2.toml") for name in ("sit", "dit"))
    evaluate = config.evaluate
    assert (config.objective.kind, evaluate.sampler, evaluate.sampling_steps) == ("flow", "sde", 250)
    assert (evaluate.sde_diffusion, evaluate.sde_norm, evaluate.num_samples) == ("sigma", None, 50_000)
    assert (config.model, config.train, config.latents) == (dit.model, dit.train, dit.latents)
