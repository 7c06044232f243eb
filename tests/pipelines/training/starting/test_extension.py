"""A training that goes on after its planned end: the learning rate is said, chosen, and exact when it resumes."""

import shutil
from dataclasses import replace

import pytest
from tiny_training import Training, assert_equal, training_recipe

from dit.schedule import TrainingConfig, learning_rate
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.dataset import LatentDataset
from pipelines.training.starting.extension import explain_schedule_change
from pipelines.training.starting.identity import train_identity
from pipelines.training.starting.prepare_checkpoints import describe_schedule_change
from raydit.errors import InvalidInput

SCHEDULE = {"lr_schedule": "linear", "warmup_steps": 2}
ENDS = {"earlier_ends": (6,)}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder with a training of six steps that has ended."""
    folder = tmp_path_factory.mktemp("ended")
    Training(training_recipe(folder, steps=6, **SCHEDULE)).run()
    return folder


def change(recipe):
    checkpoints = CheckpointFolder(recipe.folder("checkpoints"))
    return describe_schedule_change(recipe, checkpoints, checkpoints.last_step())


def test_a_jump_of_the_learning_rate_is_said_with_what_to_do_instead(ended):
    said = change(training_recipe(ended, steps=12, **SCHEDULE))
    assert said.startswith("the learning rate changes from 2.5e-04 to 6.0e-04 at step 6, because the schedule of 6")
    assert "with --set train.earlier_ends=[6], --set train.extension=constant stays at the last rate" in said
    assert change(training_recipe(ended, steps=6, **SCHEDULE)) == ""
    assert change(training_recipe(ended, steps=12, extension="constant", **ENDS, **SCHEDULE)) == ""
    for extension, rate in (("warmup", "5.0e-04"), ("planned", "6.0e-04")):
        ends = ENDS if extension == "warmup" else {}
        said = change(training_recipe(ended, steps=12, extension=extension, **ends, **SCHEDULE))
        assert said == f"the learning rate changes from 2.5e-04 to {rate} at step 6 (train.extension = {extension!r})"


def test_no_extension_is_suggested_for_fewer_steps():
    said = explain_schedule_change(TrainingConfig(steps=900, lr_schedule="linear"), {"steps": 1000}, 500)
    assert said.startswith("the learning rate changes from 5.0e-05 to 4.4e-05 at step 500")
    assert said.endswith(", because the schedule of 1,000 steps is now one of 900")


def test_lengths_of_a_training_are_in_no_identity(ended):
    recipe = training_recipe(ended, steps=6, **SCHEDULE)
    latents = LatentDataset.open(recipe.latents)
    longer = training_recipe(ended, steps=12, extension="warmup", **ENDS, **SCHEDULE)
    assert train_identity(recipe, latents) == train_identity(longer, latents)


@pytest.mark.parametrize("extension", ["constant", "warmup"])
def test_an_extended_training_ends_like_one_that_was_never_stopped(ended, tmp_path, extension):
    """Bit for bit, also when it is killed after the extension began; a fresh run of its recipe gives the same."""
    settings = {"steps": 12, "extension": extension, **ENDS, **SCHEDULE}
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    fresh = Training(training_recipe(tmp_path, output=tmp_path / "fresh", **settings))
    fresh.run()
    extended = Training(training_recipe(tmp_path, **settings))
    extended.run()
    shutil.rmtree(tmp_path / "output" / "checkpoints" / "step_0000012")
    killed = Training(training_recipe(tmp_path, **settings))
    assert change(killed.recipe) == ""
    killed.run()
    rates = {message.step: message.metrics["lr"] for message in killed.messages if hasattr(message, "metrics")}
    assert rates == {step + 1: learning_rate(killed.recipe.train, step) for step in range(9, 12)}
    for training in (extended, killed):
        assert_equal(training.weights, fresh.weights)


def test_another_extension_than_that_of_the_steps_that_are_done_is_refused(ended, tmp_path):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InvalidInput, match=r"earlier_ends = \[4\], although .* expected 'constant' with .* = \[6\]"):
        change(training_recipe(tmp_path, steps=12, extension="constant", earlier_ends=(4,), **SCHEDULE))
    recipe = training_recipe(tmp_path, steps=12, extension="constant", **ENDS, **SCHEDULE)
    Training(recipe).run()
    for other in ({"extension": None, "earlier_ends": ()}, {"extension": "warmup"}):
        with pytest.raises(InvalidInput, match=r"expected 'constant' with train.earlier_ends = \[6\], as they did"):
            change(replace(recipe, train=replace(recipe.train, **other)))
    further = replace(recipe.train, steps=18, extension="warmup", earlier_ends=(6, 12))
    with pytest.raises(InvalidInput, match=r"expected 'constant' with train.earlier_ends = \[6, 12\], as they did"):
        change(replace(recipe, train=further))
