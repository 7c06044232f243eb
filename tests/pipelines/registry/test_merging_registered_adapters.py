"""A registered adapter outlives its training's storage: it is merged from the registry's copy."""

import shutil

import pytest
import torch
from mlflow import MlflowClient
from tiny_adapter import write_factors
from tiny_checkpoint import tiny_output, write_checkpoint

from dit.checkpoint import load_checkpoint
from pipelines.checkpoints.adapters import import_adapter
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry.promotion import promote
from pipelines.registry.promotion_score import PromotionScore


@pytest.fixture
def registered(tmp_path, monkeypatch, empty_database):
    """The averaged weights of a promoted adapter, of whose output and base only the registry's copy is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    base = write_checkpoint(tiny_output(tmp_path), 2)
    adapted = import_adapter(write_factors(tmp_path / "factors", 0), tmp_path / "adapted", base.path)
    client = MlflowClient(uri)
    experiment = client.create_experiment("adapters", artifact_location=str(tmp_path / "artifacts"))
    tags = {"raydit.checkpoint": str(adapted.path), "raydit.checkpoint_digest": adapted.digest}
    run = client.create_run(experiment)
    client.create_logged_model(experiment, name="adapter", tags=tags, source_run_id=run.info.run_id)
    assert promote(uri, "adapters", "adapter", PromotionScore(adapted.digest, "p", "fid_50k", 1.0, 0.1)).given
    expected = adapted.weights()
    shutil.rmtree(adapted.path)
    shutil.rmtree(base.path.parents[1])
    return expected


def test_a_registered_adapter_is_merged_after_its_output_is_gone(raydit, registered, tmp_path):
    code, out, err = raydit("merge", "models:/adapter@champion", str(tmp_path / "merged"))
    assert (code, err) == (0, "") and "only the weights 'ema' are there" in out
    merged = load_checkpoint(tmp_path / "merged")
    for which in ("ema", "raw"):
        found = merged.weights(which)
        assert found.keys() == registered.keys()
        assert all(torch.equal(found[name], value) for name, value in registered.items())
    assert checkpoint_autoencoder(open_checkpoint(merged.path)).is_dir()
