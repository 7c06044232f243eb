"""Training from latents in a bucket into a bucket: the weights are those of a disk, to the bit."""

from dataclasses import replace

import pytest
from tiny_training import Training, assert_equal, training_recipe

from cluster import storage
from pipelines.checkpoints import stored as checkpoints
from pipelines.training.monitor import TrainingMonitor


@pytest.mark.parametrize(
    "loading",
    [pytest.param("memory", marks=pytest.mark.slow), pytest.param("memmap", marks=pytest.mark.slow), "stream"],
)
def test_a_run_in_a_bucket_goes_on_to_the_weights_of_one_on_disk(s3_bucket, tmp_path, loading):
    here = Training(training_recipe(tmp_path, loading=loading)).run()
    Training(training_recipe(tmp_path, output=f"{s3_bucket}/output", loading=loading, steps=4)).run()
    there = Training(training_recipe(tmp_path, output=f"{s3_bucket}/output", loading=loading)).run()
    assert list(there.losses) == [5, 6, 7, 8]
    assert checkpoints.finished_steps(there.recipe.folder("checkpoints")) == [3, 4, 6, 8]
    assert_equal(there.weights, here.weights)


class Run:
    """A tracking run that remembers."""

    def __init__(self):
        self.models, self.removed, self.losses = {}, [], {}

    def points(self, prefix):
        return {}

    def metrics(self, metrics, step):
        self.losses[step] = metrics["train/loss"]

    def model(self, digest, *, name, step, params, tags):
        self.models[step] = (name, tags["raydit.checkpoint"], digest)

    def model_removed(self, digest):
        self.removed.append(digest)


def test_the_driver_tells_of_checkpoints_in_a_bucket_and_removes_the_outdated(s3_bucket, tmp_path):
    """It fetches none of them."""
    training = Training(training_recipe(tmp_path, output=f"{s3_bucket}/output", checkpoint_every=2)).run()
    recipe = training.recipe
    recipe, run = replace(recipe, train=replace(recipe.train, keep_last=2)), Run()
    folder = recipe.folder("checkpoints")
    expected = {step: checkpoints.describe_step(folder, step).digest for step in (2, 4, 6, 8)}
    watch = TrainingMonitor(Surroundings(), recipe, run, 0)
    assert run.models == {
        step: (f"training-step_{step:07d}", f"{folder}/step_{step:07d}", digest) for step, digest in expected.items()
    }
    assert run.losses == training.losses  # of a driver that heard none of it
    again = Run()
    TrainingMonitor(Surroundings(), recipe, again, 0)
    assert again.losses == again.models == {}  # told once
    watch._retain()
    assert run.removed == [expected[2], expected[4]] and checkpoints.finished_steps(folder) == [6, 8]
    assert not storage.exists(storage.cache_folder("fetched"))
    assert checkpoints.open_checkpoint(f"{folder}/step_0000008").digest == expected[8]


class Surroundings:
    """What the driver needs of a StageContext here."""

    def progress(self, stage, **settings):
        return None
