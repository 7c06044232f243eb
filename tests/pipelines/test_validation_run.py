"""A pipeline on some classes, with held-out images of their own, on real engines."""

import json

import pytest
from mlflow import MlflowClient
from tiny import tiny_recipe, write_images

from pipelines.latents.held_out import held_out_latents
from pipelines.run import run_pipeline


@pytest.mark.slow
def test_a_pipeline_encodes_and_scores_the_images_for_validation(local_ray, tmp_path, capsys):
    other = write_images(tmp_path / "other", per_class=6)
    config = tiny_recipe(
        tmp_path,
        "images.held_out=0",
        f"images.validation={other}",
        'images.classes=["stripe", "blob"]',
        "evaluate.reconstructions=true",
    )
    report = run_pipeline(config)
    assert any(name.endswith("_12") for name in report.real_baseline)  # the broken one is left out
    held_out = held_out_latents(config)
    assert held_out is not None and held_out.class_names == ("blob", "stripe")
    assert (len(held_out), held_out.num_quarantined) == (12, 1)

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.name).experiment_id
    runs = client.search_runs([experiment], "tags.`raydit.stage` = 'encode'")
    (run,) = (run for run in runs if run.data.tags["raydit.latents_fingerprint"] == held_out.fingerprint)
    assert len(runs) == 2 and run.info.status == "FINISHED"
    assert run.data.metrics["encode/held_out_images"] == 12 and run.data.metrics["encode/quarantined"] == 1
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["held-out images"]
    checkpoint = tmp_path / "output" / "checkpoints" / "step_0000006" / "config.json"
    assert json.loads(checkpoint.read_text())["class_names"] == ["blob", "stripe"]

    capsys.readouterr()
    run_pipeline(config)
    assert capsys.readouterr().out.count("already finished") == 5
