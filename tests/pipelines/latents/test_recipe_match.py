"""Latents that a recipe does not describe are refused before anything is trained on them."""

import re
from dataclasses import replace

import pytest
from tiny_encode import Context, encode_here, recipe

from pipelines.images.listing import falls_into_share
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.recipe_match import require_latents_of, require_training_images
from pipelines.latents.shards import recorded_keys
from pipelines.train import train
from raydit.errors import InvalidInput


@pytest.fixture
def config(tmp_path):
    return recipe(tmp_path, "images.held_out=0.3")


@pytest.fixture
def latents(config, monkeypatch):
    return encode_here(config, monkeypatch)


def with_images(config, **settings):
    return replace(config, images=replace(config.images, **settings))


def test_latents_of_the_recipe_are_accepted(config, latents):
    require_latents_of(config, latents)
    for held_out in (0.3, 0.2, 0.0):  # of which none is among those of 0.3 that are trained on
        require_training_images(replace(config.images, held_out=held_out), latents)
    require_training_images(replace(config.images, classes=("stripe", "blob", "ring")), latents)


@pytest.mark.parametrize(("name", "value"), [("crop", "resize"), ("size", 32)])
def test_latents_of_another_size_or_crop_are_refused(config, latents, name, value):
    made = getattr(config.images, name)
    message = f"with images.{name} = {made!r}, expected the recipe's, {value!r}. Run `raydit encode` .* to {made!r}"
    with pytest.raises(InvalidInput, match=message):
        train(with_images(config, **{name: value}), context=Context())
    assert not (LatentDataset.open(config.latents).description.preprocessing[name] == value)


def test_latents_of_images_that_are_to_be_held_out_are_refused(config, latents):
    leaked = sorted(key for key in recorded_keys(latents) if falls_into_share(key, 0.7))
    assert 0 < len(leaked) < len(recorded_keys(latents))
    message = re.escape(f"images.held_out = 0.3: {len(leaked)} of their images, such as {leaked[0]}, would be trained")
    with pytest.raises(InvalidInput, match=message):
        train(with_images(config, held_out=0.7), context=Context())
    require_training_images(replace(config.images, held_out=0.3 + 1e-9), latents)  # which holds out no others


def test_latents_of_other_classes_are_refused(config, latents):
    with pytest.raises(InvalidInput, match="of the classes blob, ring, stripe, expected the recipe's, ring. Run"):
        train(with_images(config, classes=("ring",)), context=Context())
