"""Workers train on the latents that the command planned with, whatever lies at their path by then."""

import pytest
import torch
from tiny_training import ROWS, settings_of_worker, training_recipe, write_held_out, write_latents

from pipelines.training.group.worker import Worker
from pipelines.training.loop import train_worker
from raydit.errors import InvalidInput


def start_worker(settings):
    train_worker(Worker(0, 1, torch.device("cpu"), lambda message: None), settings)


def test_a_worker_that_starts_after_images_were_added_refuses_the_latents(tmp_path):
    """All images would be in another order than before, and the training would seem to resume exactly."""
    recipe = training_recipe(tmp_path, steps=1)
    settings = settings_of_worker(recipe)
    before = settings.latents.open().fingerprint
    grown = write_latents(recipe, num_rows=ROWS + 12)
    found, expected = grown.fingerprint[:12], before[:12]
    with pytest.raises(InvalidInput, match=f"{recipe.latents} have changed .* {found}, expected {expected}"):
        start_worker(settings)
    assert not settings.checkpoints.has_any()
    assert len(settings_of_worker(recipe).latents.open()) == ROWS + 12


def test_a_worker_refuses_other_held_out_latents(tmp_path):
    recipe = training_recipe(tmp_path, steps=1, validate_every=1, checkpoint_every=1)
    write_held_out(recipe, 8)
    settings = settings_of_worker(recipe)
    write_held_out(recipe, 9)
    with pytest.raises(InvalidInput, match=f"{recipe.latents_held_out} have changed"):
        start_worker(settings)
    assert not settings.checkpoints.has_any()
