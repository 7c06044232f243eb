"""Training with latents and checkpoints in a bucket gives the weights of a training on disk, to the bit."""

from dataclasses import replace

import pytest
from fakes import FakeContext, FakeRun
from tiny_training import ROWS, Training, assert_equal, training_recipe, write_latents

from cluster import storage
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.train import start_monitor
from pipelines.training.data.order import EpochOrder


@pytest.mark.parametrize(
    "loading",
    [pytest.param("memory", marks=pytest.mark.slow), pytest.param("memmap", marks=pytest.mark.slow), "stream"],
)
def test_a_run_resumed_in_a_bucket_gives_the_weights_of_one_on_disk(s3_bucket, tmp_path, loading):
    here = Training(training_recipe(tmp_path, loading=loading)).run()
    Training(training_recipe(tmp_path, output=f"{s3_bucket}/output", loading=loading, steps=4)).run()
    there = Training(training_recipe(tmp_path, output=f"{s3_bucket}/output", loading=loading)).run()
    assert list(there.losses) == [5, 6, 7, 8]
    assert CheckpointFolder(there.recipe.folder("checkpoints")).finished_steps() == [3, 4, 6, 8]
    assert_equal(there.weights, here.weights)


def test_a_rollback_in_a_bucket_gives_the_weights_of_one_on_disk(s3_bucket, tmp_path):
    poisoned = EpochOrder(ROWS, seed=3).rows(range(4 * 8, 5 * 8))[:1]
    runs = []
    for output in (str(tmp_path / "output"), f"{s3_bucket}/output"):
        recipe = training_recipe(tmp_path, output=output, max_skipped=1)
        write_latents(recipe, poisoned)
        runs.append(Training(recipe).run())
    here, there = runs
    assert there.notices[1] == here.notices[1] == "batches skipped in a row: 1; rolling back to step 3"
    assert_equal(there.weights, here.weights)


def test_the_driver_logs_checkpoints_in_a_bucket_and_removes_the_outdated_without_fetching_any(s3_bucket, tmp_path):
    training = Training(training_recipe(tmp_path, output=f"{s3_bucket}/output", checkpoint_every=2)).run()
    recipe = training.recipe
    recipe, run = replace(recipe, train=replace(recipe.train, keep_last=2)), FakeRun()
    checkpoints = CheckpointFolder(recipe.folder("checkpoints"))
    expected = {step: checkpoints.describe(step).digest for step in (2, 4, 6, 8)}
    monitor = start_monitor(recipe, FakeContext(), run, checkpoints, 0)
    assert run.models == {
        digest: (f"training-step_{step:07d}", step, checkpoints.uri_of(step)) for step, digest in expected.items()
    }
    assert run.values("train/loss") == training.losses  # though the driver received no message
    again = FakeRun()
    start_monitor(recipe, FakeContext(), again, checkpoints, 0)
    assert again.logged == {} and again.models == {}  # they were logged before
    monitor._remove_outdated()
    assert run.removed == [expected[2], expected[4]] and checkpoints.finished_steps() == [6, 8]
    assert not storage.exists(storage.cache_folder("fetched"))
    assert checkpoints.open(8).digest == expected[8]
