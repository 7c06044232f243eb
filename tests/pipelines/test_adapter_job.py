"""Trainings of an adapter on Ray: replicated and sharded, their run in MLflow, and samples by command."""

import pytest
import torch
from mlflow import MlflowClient
from tiny_training import final_weights, training_recipe

from pipelines.registry.lineage import lineage
from pipelines.stage import StageContext
from pipelines.tracking.bases import base_digests
from pipelines.train import train

pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # each starts a group of workers or more


def run(recipe, **options):
    with StageContext(recipe) as context:
        return train(recipe, context=context, **options)


@pytest.fixture(scope="module")
def base(local_ray, tmp_path_factory):
    """The newest checkpoint of a finished training."""
    return run(training_recipe(tmp_path_factory.mktemp("base")))


def adapted(folder, base, **settings):
    lora = {"rank": 2, "targets": ["attention", "mlp"]}
    start = {"checkpoint": str(base.path), "reset": ["labels"]}
    return training_recipe(folder, start=start, lora=lora, **settings)


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize(
    "settings", [{"strategy": "ddp"}, {"strategy": "fsdp", "gradient_checkpointing": True}], ids=["ddp", "fsdp"]
)
def test_several_workers_train_an_adapter_as_one_does(base, tmp_path, settings, num_workers):
    run(alone := adapted(tmp_path / "alone", base))
    run(together := adapted(tmp_path / "together", base, num_workers=num_workers, **settings))
    found, expected = final_weights(together), final_weights(alone)
    assert {name.split("/")[1] for name in found} == {"adapter_model", "optimizer"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_names_its_base_which_is_then_protected(base, tmp_path, raydit):
    recipe = adapted(tmp_path, base)
    checkpoint = run(recipe)
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.name).experiment_id
    (training,) = client.search_runs([experiment])
    assert training.data.tags["raydit.base_digest"] == base.digest
    assert base_digests(recipe.tracking.uri) == {base.digest}
    assert not [link for link in lineage(str(checkpoint.path)) if link.kind in ("start", "checkpoint") and link.broken]
    assert run(recipe).digest == checkpoint.digest
    code, _, err = raydit("sample", str(checkpoint.path), "--out", str(tmp_path / "grid.png"))
    assert (code, err) == (0, "") and (tmp_path / "grid.png").exists()
