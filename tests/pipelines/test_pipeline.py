"""The whole story on real engines: Ray Data, Ray Train, Parquet, diffusers, MLflow."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from tiny import BROKEN, tiny_recipe

from evaluation.metric_names import METRIC_KINDS
from evaluation.report import EvaluationReport
from pipelines.artifacts import Artifact
from pipelines.encode import encode
from pipelines.evaluate import evaluate
from pipelines.images.open import open_source
from pipelines.latents.dataset import LatentDataset
from pipelines.run import run_pipeline
from pipelines.scoring.reports.report_files import set_aside_other_report
from pipelines.stage import StageContext
from pipelines.train import train
from raydit.errors import StorageFailed


@pytest.fixture
def copy(finished, local_ray, tmp_path):
    """A copy of the finished pipeline that a test may change; its recipe."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
    return tmp_path / "copy"


def report_of(folder) -> dict:
    (path,) = (folder / "output" / "evaluations").glob("*/*/report.json")
    return json.loads(path.read_text())


def test_every_artifact_is_there_and_describes_itself(finished):
    folder, config = finished
    output = folder / "output"
    manifest = json.loads((output / "latents" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("raydit.latents", 1)
    assert manifest["rows"] == sum(shard["rows"] for shard in manifest["shards"])
    assert manifest["class_names"] == ["blob", "ring", "stripe"]
    assert sorted(path.name for path in (output / "checkpoints").glob("step_*")) == [
        "step_0000002",
        "step_0000004",
        "step_0000006",
    ]
    described = json.loads((output / "checkpoints" / "step_0000006" / "config.json").read_text())
    assert described["latents_fingerprint"] == manifest["fingerprint"]
    assert described["autoencoder"]["sha256"] == manifest["autoencoder"]["sha256"]
    assert described["recipe"]["train"]["steps"] == 6


def test_latents_open_without_us(finished):
    folder, _ = finished
    table = pq.read_table(folder / "output" / "latents" / "part-00000.parquet")
    description = json.loads(table.schema.metadata[b"raydit"])
    channels = description["moments_shape"][0]
    row = table.slice(0, 1).to_pylist()[0]
    moments = np.frombuffer(row["moments"], "<f2").reshape(channels, 8, 8)
    assert channels == 8 and np.isfinite(moments).all()
    assert "moments_flip" not in row


def test_latents_are_what_the_autoencoder_says_of_the_images(finished):
    """Against diffusers alone: the posterior of every image, in float16."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    from pipelines.images.preprocess import crop_image

    folder, _ = finished
    dataset = LatentDataset.open(folder / "output" / "latents")
    autoencoder = AutoencoderKL.from_pretrained(folder / "output" / "autoencoder", low_cpu_mem_usage=False)
    for shard in dataset.shards:
        for row in pq.read_table(Path(dataset.path) / shard.file).to_pylist():
            image = crop_image(Image.open(folder / "images" / row["key"]), 16, "adm")
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                expected = autoencoder.encode(pixels).latent_dist.parameters[0].numpy()
            stored = np.frombuffer(row["moments"], "<f2").reshape(8, 8, 8)
            np.testing.assert_allclose(stored, expected, atol=2e-2, rtol=2e-3)


def test_the_report_names_protocol_checkpoint_and_floor(finished):
    folder, _ = finished
    report = report_of(folder)
    assert report["protocol"]["num_samples"] == 16
    assert report["protocol_id"] == EvaluationReport.from_json(json.dumps(report)).protocol_id
    assert {"fd_efficientnet_lite0_16", "is_efficientnet_lite0_16", "kid_efficientnet_lite0_16"} <= report[
        "metrics"
    ].keys()
    assert all(name.startswith(tuple(METRIC_KINDS)) for name in report["floor"])
    (page,) = (folder / "output" / "evaluations").glob("*/*/report.html")
    assert report["protocol_id"] in page.read_text() and "data:image/png;base64," in page.read_text()


def test_a_second_run_skips_everything(copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in artifact_files(copy / "output") if path.is_file()}
    run_pipeline(tiny_recipe(copy))
    assert capsys.readouterr().out.count("already finished") == 4
    after = {path: path.stat().st_mtime_ns for path in artifact_files(copy / "output") if path.is_file()}
    assert before == after


@pytest.fixture
def read_only(copy):
    """The copy, whose output is on a file system that is mounted read-only."""
    output = str(copy / "output")
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", output, output], capture_output=True).returncode != 0:
        pytest.skip("mounting a folder read-only needs root and the right to mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", output], check=True)
    yield copy
    subprocess.run(["umount", output], check=True)


def test_what_is_finished_on_a_read_only_disk_is_found_and_work_is_refused(read_only, raydit):
    config = tiny_recipe(read_only)
    (checkpoint,) = Path(config.folder("checkpoints")).glob("step_0000006")
    report = run_pipeline(config)
    assert json.loads(report.to_json()) == report_of(read_only)
    with StageContext(config) as context:
        assert train(config, context=context).origin == str(checkpoint)
        assert encode(config, context=context).path == config.latents
    again = ("--json", "--set", f"tracking.uri={config.tracking.uri}")
    code, out, err = raydit("evaluate", str(checkpoint), *again)
    assert code == 0 and "already finished" in err + out, err
    for override in ("seed=5", "train.steps=8", "images.crop=resize", "evaluate.num_samples=12"):
        with pytest.raises(
            StorageFailed, match="output(/evaluations)? cannot be written .*, expected a folder that can"
        ):
            run_pipeline(tiny_recipe(read_only, override))


def test_what_a_later_stage_refuses_is_refused_before_anything_moves(copy):
    """Each of these recipes would train anew."""
    refused = {
        "model.patch_size=3": "multiples of patch_size = 3",
        "evaluate.gpus_per_worker=1": "evaluate asks for 1 workers of 1 CPU, 1 GPU each",
        "evaluate.dtype=tf32": "evaluate.dtype: found 'tf32', and this CPU has no TF32",
        "evaluate.reference=missing.npz": "evaluate.reference: nothing at missing.npz",
        "train.keep_best=fid": "metric name 'fid'",
    }
    before = artifact_files(copy / "output")
    for override, message in refused.items():
        with pytest.raises(ValueError if "missing" not in override else FileNotFoundError, match=message):
            run_pipeline(tiny_recipe(copy, "train.keep_last=3", "train.learning_rate=5e-4", override))
    assert artifact_files(copy / "output") == before


def artifact_files(output):
    """All files of an output but the lease, and the journals, which are named after the store and move with a copy."""
    return {path for path in output.rglob("*") if not {".tracking", ".lease.json"} & set(path.parts)}


def test_what_fits_again_is_taken_back_instead_of_made_anew(copy, capsys):
    """As after runs of another recipe in the same output. Without Ray: there is nothing to do."""
    config, output, before = tiny_recipe(copy), copy / "output", report_of(copy)
    for name in ("autoencoder", "latents", "checkpoints"):
        Artifact(name, str(output / name), {"another": "recipe"}).prepare()
    (path,) = (output / "evaluations").glob("*/*/report.json")
    picture = path.with_name("samples.png").read_bytes()
    set_aside_other_report(str(path.parent), "0" * 64)
    assert not path.exists()
    path.with_name("samples.png").write_bytes(b"of another checkpoint")
    capsys.readouterr()
    report = run_pipeline(config)
    out = capsys.readouterr().out
    assert out.count("takes back the earlier results from") == 3 and out.count("already finished") == 4
    assert json.loads(report.to_json()) == before == report_of(copy)
    assert path.with_name("samples.png").read_bytes() == picture


@pytest.mark.slow
def test_evaluation_alone_is_done_again_and_gives_the_same_numbers_on_other_workers(copy, capsys):
    before = report_of(copy)
    shutil.rmtree(copy / "output" / "evaluations")
    report = run_pipeline(tiny_recipe(copy, "evaluate.num_workers=2", "evaluate.shard_rows=4"))
    assert capsys.readouterr().out.count("already finished") == 3
    assert report.protocol_id == before["protocol_id"]
    # The features are equal to the bit; the last digits of a distance between singular covariances (fewer samples than
    # dimensions) depend on how many threads the process that scores gives to its matrix products.
    assert report.metrics == pytest.approx(EvaluationReport.from_json(json.dumps(before)).metrics, rel=1e-9)


@pytest.mark.slow
def test_a_changed_setting_reruns_the_stages_after_it_and_says_why(copy, capsys):
    before = report_of(copy)
    report = run_pipeline(tiny_recipe(copy, "train.learning_rate=5e-4"))
    out = capsys.readouterr().out
    assert "train.learning_rate: 0.001 -> 0.0005" in out
    assert out.count("already finished") == 2
    assert (copy / "output" / "superseded" / "checkpoints-1" / "step_0000006" / "COMPLETE").exists()
    assert report.checkpoint_digest != before["checkpoint_digest"]


@pytest.mark.slow
def test_a_deleted_shard_is_all_that_is_encoded_again(copy):
    """As after a kill in mid-encode: some shards finished, one not, no manifest."""
    latents = copy / "output" / "latents"
    unbroken = {path.name: path.read_bytes() for path in latents.glob("*.parquet")}
    config = tiny_recipe(copy)
    shutil.move(latents, copy / "unbroken")
    encode(config)
    assert {path.name: path.read_bytes() for path in latents.glob("*.parquet")} == unbroken


@pytest.mark.slow
def test_training_goes_on_from_the_newest_checkpoint_to_the_bit(copy):
    """As after a kill between steps 2 and 4: the rest is done again and ends in the same place."""
    checkpoints = copy / "output" / "checkpoints"
    unbroken = {path.name: path.read_bytes() for path in (checkpoints / "step_0000006").rglob("*.safetensors")}
    for step in ("step_0000004", "step_0000006"):
        shutil.rmtree(checkpoints / step)
    (checkpoints / ".tmp-step_0000004").mkdir()
    checkpoint = train(tiny_recipe(copy))
    resumed = {path.name: path.read_bytes() for path in checkpoint.path.rglob("*.safetensors")}
    assert resumed == unbroken


@pytest.mark.slow
def test_more_steps_go_on_and_fewer_start_anew(copy, capsys):
    checkpoint = train(tiny_recipe(copy, "train.steps=8"))
    assert checkpoint.step == 8 and "resumes from step 6" in capsys.readouterr().out
    checkpoint = train(tiny_recipe(copy, "train.steps=4"))
    assert checkpoint.step == 4 and "train.steps: 8 -> 4" in capsys.readouterr().out


def test_an_unreadable_image_is_quarantined_and_counts_add_up(finished):
    folder, config = finished
    dataset = LatentDataset.open(folder / "output" / "latents")
    quarantine = pq.read_table(Path(dataset.path) / "quarantine.parquet").to_pylist()
    assert [entry["key"] for entry in quarantine] == [BROKEN]
    assert "UnidentifiedImageError" in quarantine[0]["error"]
    training, _ = open_source(config.images).listing().split(config.images.held_out)
    assert len(dataset) + len(quarantine) == len(training)


def test_the_run_of_the_encode_job_tells_throughput_counts_fingerprint_and_its_images(finished):
    folder, config = finished
    client = MlflowClient(config.tracking.uri)
    experiments = [client.get_experiment_by_name(config.name).experiment_id]
    (run,) = client.search_runs(experiments, "tags.`raydit.stage` = 'encode'")
    dataset = LatentDataset.open(folder / "output" / "latents")
    assert run.info.status == "FINISHED"
    assert run.data.tags["raydit.latents_fingerprint"] == dataset.fingerprint
    assert run.data.metrics["encode/images"] == len(dataset)
    assert run.data.metrics["encode/quarantined"] == 1
    assert run.data.metrics["encode/images_per_second"] > 0
    (read,) = run.inputs.dataset_inputs
    training, _ = open_source(config.images).listing().split(config.images.held_out)
    assert read.dataset.name == "images" and training.digest.startswith(read.dataset.digest)
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "encoding")]


def test_latents_of_another_autoencoder_are_refused(copy):
    config = tiny_recipe(copy)
    manifest_path = copy / "output" / "latents" / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["autoencoder"] |= {"sha256": "0" * 64, "tensors_sha256": "0" * 64}
    manifest_path.write_text(json.dumps(manifest))
    message = "made by the autoencoder .* expected the recipe's, .* Run `raydit encode` again"
    with pytest.raises(ValueError, match=message):
        train(config)


def test_a_checkpoint_with_another_decoder_is_refused(copy):
    weights = copy / "output" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="sha256 .* was trained on latents of"):
        evaluate(copy / "output" / "checkpoints" / "step_0000006", config=tiny_recipe(copy))


def test_more_workers_than_the_cluster_holds_are_refused(copy, local_ray):
    config = tiny_recipe(copy, "train.num_workers=64", "train.global_batch_size=64")
    with pytest.raises(ValueError, match="64 workers"):
        train(config)


@pytest.mark.slow
def test_another_checkpoint_under_the_same_step_is_scored_anew(copy):
    """The report of the earlier one is kept under its digest."""
    config = tiny_recipe(copy)
    path = copy / "output" / "checkpoints" / "step_0000006"
    old = report_of(copy)
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step_0000004"), path)
    report = evaluate(path, config=dataclasses.replace(config))
    assert report.checkpoint_digest != old["checkpoint_digest"]
    (kept,) = (copy / "output" / "evaluations").glob("*/step_0000006/report-*.json")
    assert json.loads(kept.read_text())["metrics"] == old["metrics"]


def test_more_threads_than_cores_are_said_in_one_line(copy, capsys):
    cores = os.cpu_count()
    config = tiny_recipe(copy, f"encode.cpus_per_worker={cores}", "encode.num_workers=2")
    with StageContext(config) as context:
        for _ in range(2):
            context.start_ray(config.encode, "encode")
        context.start_ray(config.evaluate, "evaluate")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "threads" in line]
    assert f"workers have 2 x {cores} = {2 * cores} threads on {cores} cores" in said
