"""The train job on Ray: its output and its MLflow run, training at a URI, and sharded weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from tiny_training import (
    ROWS,
    assert_equal,
    final_weights,
    settings_of_worker,
    training_recipe,
    write_held_out,
    write_latents,
)

from dit.checkpoint import restore
from dit.objective import create_process
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.stage import StageContext
from pipelines.train import train
from pipelines.training.cursor import DataCursor
from pipelines.training.data.order import EpochOrder
from pipelines.training.group.worker import Worker
from pipelines.training.loop import create_training_state
from pipelines.training.validation import Validation
from raydit.errors import Diverged

pytestmark = pytest.mark.slow  # each starts a group of workers or two


def run(recipe, local_ray):
    with StageContext(recipe) as context:
        return train(recipe, context=context)


def store(recipe):
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.name).experiment_id
    (training,) = client.search_runs([experiment])
    models = {model.name: model for model in client.search_logged_models(experiment_ids=[experiment])}
    return client, training, models


@pytest.fixture(scope="module")
def watched(local_ray, tmp_path_factory):
    """Train with previews, and with a retention that removes some checkpoints."""
    recipe = training_recipe(
        tmp_path_factory.mktemp("watched"), checkpoint_every=2, sample_every=4, keep_last=1, keep_every=6
    )
    run(recipe, local_ray)
    return recipe


def test_outdated_checkpoints_are_removed_and_marked_in_tracking(watched):
    assert CheckpointFolder(watched.folder("checkpoints")).finished_steps() == [6, 8]
    _, _, models = store(watched)
    removed = {name: model.tags.get("raydit.removed") for name, model in models.items()}
    assert removed == {
        "training-step_0000002": "true",
        "training-step_0000004": "true",
        "training-step_0000006": None,
        "training-step_0000008": None,
    }


def test_grids_of_samples_are_drawn_during_training(watched):
    client, training, _ = store(watched)
    files = sorted(Path(watched.folder("samples")).iterdir())
    assert [file.name for file in files] == ["step_0000004.png", "step_0000008.png"]
    assert Image.open(files[0]).size == Image.open(files[1]).size
    assert files[0].read_bytes() != files[1].read_bytes()
    images = [file.path for file in client.list_artifacts(training.info.run_id, "images")]
    assert {int(path.split("step+")[1].split("+")[0]) for path in images if path.endswith(".png")} == {4, 8}


def test_the_run_has_all_metrics(watched):
    _, training, _ = store(watched)
    metrics = training.data.metrics
    names = ["loss", "lr", "grad_norm", "images_per_second", "data_wait", "mfu", "memory_gib"]
    assert {f"train/{name}" for name in names} <= metrics.keys()
    assert any(name.startswith("train/loss_quartile_") for name in metrics)
    assert not any(name.startswith(("train/sum_", "train/count_")) for name in metrics)


def test_a_training_at_a_uri_equals_one_on_disk_and_resumes(local_ray, s3_bucket, tmp_path):
    on_disk = training_recipe(tmp_path, tmp_path / "disk")
    run(on_disk, local_ray)
    latents = {"encode": {"output": on_disk.latents}}
    run(training_recipe(tmp_path, f"{s3_bucket}/out put ü", steps=4, **latents), local_ray)
    in_bucket = training_recipe(tmp_path, f"{s3_bucket}/out put ü", **latents)
    checkpoint = run(in_bucket, local_ray)
    assert checkpoint.origin == f"{s3_bucket}/out put ü/checkpoints/step_0000008"
    assert_equal(final_weights(in_bucket), final_weights(on_disk))


def test_fsdp_agrees_with_ddp(local_ray, tmp_path):
    ddp, fsdp = (training_recipe(tmp_path / strategy, strategy=strategy, num_workers=2) for strategy in ("ddp", "fsdp"))
    run(ddp, local_ray)
    run(fsdp, local_ray)
    torch.testing.assert_close(final_weights(fsdp), final_weights(ddp), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_measure_the_validation_loss_and_train_as_without_it(local_ray, tmp_path, strategy):
    """The loss is that of one worker with the same weights, to rounding: its batches are the same."""
    settings = {"strategy": strategy, "num_workers": 2}
    plain = training_recipe(tmp_path / "plain", **settings)
    validated = training_recipe(tmp_path / "validated", validate_every=1, **settings)
    write_held_out(validated, 75)
    run(plain, local_ray)
    newest = run(validated, local_ray)
    assert_equal(final_weights(validated), final_weights(plain))
    found = DataCursor.of(newest).validation_at(8)
    alone = replace(validated, train=replace(validated.train, strategy="ddp", num_workers=1))
    worker_settings = settings_of_worker(alone)
    worker = Worker(0, 1, torch.device("cpu"), lambda message: None)
    state = restore(create_training_state(worker_settings, worker), newest)
    process = create_process(**worker_settings.objective)
    expected = Validation(worker_settings, process, worker, lambda step, metrics: None).measure(state)
    assert found == pytest.approx(expected, rel=1e-5) and found["loss"] != found["raw_loss"]
    _, training, _ = store(validated)
    assert training.data.metrics["validation/loss"] == found["loss"]


def test_a_training_that_starts_over_is_a_new_run_and_one_that_resumes_is_not(local_ray, tmp_path):
    """The first try ends before its first checkpoint; the third stops after one, and the fourth goes on."""
    recipe = training_recipe(tmp_path, on_nonfinite="stop", checkpoint_every=8)
    poisoned = EpochOrder(ROWS, seed=3).rows(range(4 * 8, 5 * 8))[:1]
    write_latents(recipe, poisoned=poisoned)
    with pytest.raises(Diverged):
        run(recipe, local_ray)
    train_with = lambda **settings: replace(recipe, train=replace(recipe.train, **settings))  # noqa: E731
    run(train_with(on_nonfinite="skip", steps=6, num_workers=2), local_ray)
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.name).experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time"])
    assert [each.info.status for each in runs] == ["FAILED", "FINISHED"]
    steps = [[point.step for point in client.get_metric_history(each.info.run_id, "train/loss")] for each in runs]
    assert steps == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    second = runs[1].data
    assert second.tags["raydit.setting.train.num_workers"] == "2" and second.tags["raydit.setting.train.steps"] == "6"
    assert second.params["train.learning_rate"] == "0.001" and "train.num_workers" not in second.params
