"""Trainings from a checkpoint, on Ray: killed and run again, on several workers, sharded, and on new data."""

import time

import pytest
import torch
from mlflow import MlflowClient
from tiny_training import assert_equal, final_weights, training_recipe, write_latents
from training_folder import TrainingFolder

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.registry.lineage import lineage
from pipelines.stage import StageContext
from pipelines.train import train

pytestmark = pytest.mark.slow  # each starts a group of workers or more

STEPS = 120


def run(recipe, **options):
    with StageContext(recipe) as context:
        return train(recipe, context=context, **options)


@pytest.fixture(scope="module")
def base(local_ray, tmp_path_factory):
    """The newest checkpoint of a finished training."""
    return run(training_recipe(tmp_path_factory.mktemp("base")))


def tuned(folder, base, **settings):
    start = {"checkpoint": str(base.path), "freeze": ["blocks.0.*"], **settings.pop("start", {})}
    return training_recipe(folder, start=start, **settings)


def test_the_run_and_the_lineage_have_the_start(base, tmp_path):
    recipe = tuned(tmp_path, base)
    checkpoint = run(recipe)
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.name).experiment_id
    (training,) = client.search_runs([experiment])
    sha256 = base.files["ema.safetensors"]
    assert training.data.tags["raydit.start_sha256"] == sha256 == training.data.params["start.sha256"]
    assert training.data.tags["raydit.start"] == str(base.path)
    names = {model.name for model in client.search_logged_models(experiment_ids=[experiment])}
    assert names == {f"training-step_000000{step}" for step in (0, 3, 6, 8)}
    (link,) = [link for link in lineage(str(checkpoint.path), quick=True) if link.kind == "start"]
    assert (link.digest, link.broken, link.unknown) == (sha256, [], [])
    again = run(recipe)
    assert again.digest == checkpoint.digest and len(client.search_runs([experiment])) == 1


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_workers_train_as_one_does(base, tmp_path, strategy, num_workers):
    """A frozen block is no gradient to all-reduce, and no shard that changes."""
    settings = {"lr_multipliers": {"final_layer.*": 3.0}, "layer_decay": 0.5}
    run(alone := tuned(tmp_path / "alone", base, **settings))
    run(together := tuned(tmp_path / "together", base, num_workers=num_workers, strategy=strategy, **settings))
    found, expected = final_weights(together), final_weights(alone)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any("exp_avg/blocks.0." in name for name in found)
    start = base.weights("ema")
    for name in (name for name in start if name.startswith("blocks.0.")):
        assert torch.equal(found[f"8/model/{name}"], start[name]) and torch.equal(found[f"8/ema/{name}"], start[name])


def test_new_data_start_a_new_training_from_the_newest_checkpoint(local_ray, tmp_path):
    recipe = training_recipe(tmp_path)
    before = run(recipe)
    write_latents(recipe, num_rows=60)
    averaged = before.weights("ema")
    after = run(recipe, accept_new_data=True)
    checkpoints = CheckpointFolder(recipe.folder("checkpoints"))
    assert checkpoints.finished_steps() == [0, 3, 6, 8] and after.digest != before.digest
    assert_equal(checkpoints.open(0).weights("raw"), averaged)
    assert run(recipe).digest == after.digest == run(recipe, accept_new_data=True).digest


def test_killed_before_and_after_its_first_checkpoint_it_is_the_same_training(base, tmp_path):
    settings = {"steps": STEPS, "start": {"checkpoint": str(base.path), "freeze": ["blocks.0.*"]}}
    model = {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
    unbroken = TrainingFolder(tmp_path / "unbroken", model=model, **settings)
    unbroken.finish(unbroken.start())
    training = TrainingFolder(tmp_path / "killed", model=model, **settings)
    folder = training.folder / "output" / "checkpoints"
    for is_reached in (
        lambda: (folder / "plan.json").exists(),
        lambda: (folder / "step_0000000" / "COMPLETE").exists(),
        lambda: training.newest() >= 40,
    ):
        process = training.start()
        while not is_reached():
            assert process.poll() is None, training.log()
            time.sleep(0.005)
        process.kill()
        process.wait()
    training.finish(training.start())
    assert_equal(final_weights(training.recipe), final_weights(unbroken.recipe))
    assert training.losses() == unbroken.losses()
