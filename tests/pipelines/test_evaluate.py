"""Evaluation on a real Ray gives the numbers of a plain loop, with any workers, for any checkpoint or images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL
from pyarrow.fs import LocalFileSystem, copy_files
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster import storage
from evaluation.extractors import create_extractor
from evaluation.metrics import inception_score
from evaluation.pages.report_page import render_page
from evaluation.protocol import sample_label, shard_ranges
from evaluation.report import EvaluationReport
from evaluation.score import score
from pipelines.checkpoints.open import open_checkpoint
from pipelines.cli.main import cli
from pipelines.images.open import open_source
from pipelines.images.preprocess import read_cropped
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import (
    RealImages,
    extract_adm_images,
    load_given_reference,
    load_real_features,
)
from pipelines.scoring.reports.log_report import TIME_FILE
from pipelines.scoring.reports.report_files import save_report
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.scoring.score_checkpoint import CheckpointEvaluation, group_by_settings
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A recipe of ten samples with one Euler step, and two checkpoints in its output."""
    folder = tmp_path_factory.mktemp("evaluated")
    settings = ("evaluate.num_samples=10", "evaluate.shard_rows=4", "evaluate.batch_size=4")
    config = tiny_output(folder, *settings, "evaluate.reconstructions=true")
    for step in (2, 4):
        write_checkpoint(config, step)
    return config


@pytest.fixture(scope="module")
def checkpoint(config):
    return Path(config.folder("checkpoints")) / "step_0000004"


@pytest.fixture(scope="module")
def saved(config):
    """The folder that the evaluation saves its samples in."""
    return Path(config.output).parent / "saved"


@pytest.fixture(scope="module")
def called(config, checkpoint, saved, local_ray):
    """The output of `raydit evaluate` with several checkpoints and seeds, and its last line as JSON."""
    command = ["evaluate", str(checkpoint.with_name("step_0000002")), str(checkpoint), "--repeats", "2"]
    command += ["--save-images", str(saved), "--promote", "tiny", "--json"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(result.output.splitlines()[-1])


@pytest.fixture
def report(called):
    """The report of `checkpoint` with the recipe's own seed."""
    return EvaluationReport.from_json(json.dumps(called[1]["reports"][1]))


@pytest.fixture(scope="module")
def plain(config, checkpoint):
    """Images, labels, features and logits of the same samples, from a plain loop in one process."""
    opened = open_checkpoint(checkpoint)
    protocol = evaluation_protocol(ScoringSettings.from_recipe(config), opened)
    torch.set_num_threads(config.evaluate.cpus_per_worker)
    sampler = CheckpointSampler(checkpoint, protocol, batch_size=config.evaluate.batch_size)
    labels = sampler.labels(range(10))
    images = np.concatenate([sampler.sample(part, labels[part.start : part.stop]) for part in shard_ranges(10, 4)])
    extractor = create_extractor("efficientnet-lite0")
    parts = [extractor(torch.from_numpy(images[part]).permute(0, 3, 1, 2)) for part in map(list, shard_ranges(10, 4))]
    features, logits = (np.concatenate([getattr(part, name) for part in parts]) for name in ("features", "logits"))
    return images, labels, features, logits


def test_the_numbers_are_those_of_a_plain_loop(config, report, plain):
    _, _, features, logits = plain
    reference, _ = load_real_features(RealImages.of(ScoringSettings.from_recipe(config)))
    expected = score(features, logits, reference, extractor="efficientnet-lite0", num_samples=10)
    assert {name: report.metrics[name] for name in expected.metrics} == pytest.approx(expected.metrics, rel=1e-9)
    assert report.metrics["is_efficientnet_lite0_10"] == pytest.approx(inception_score(logits)[0], rel=1e-9)
    assert report.protocol.num_samples == 10


def test_reconstructions_are_those_of_diffusers(config, report):
    """Held-out images through diffusers' own encoder and decoder, scored like the samples."""
    settings = ScoringSettings.from_recipe(config)
    real = RealImages.of(settings)
    shown = real.held_out.take(np.arange(10) * len(real.held_out) // 10)
    images, _, _ = read_cropped(settings.images, shown.keys, shown.locations)
    module = AutoencoderKL.from_pretrained(config.folder("autoencoder"))
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = module.decode(module.encode(pixels).latent_dist.mean).sample
    decoded = (decoded * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    features = create_extractor("efficientnet-lite0")(decoded)
    reference, _ = load_real_features(real)
    expected = score(
        features.features, features.logits, reference, extractor="efficientnet-lite0", num_samples=10, errors=False
    )
    assert report.reconstructions == pytest.approx(expected.metrics, rel=1e-3)
    assert report.reconstructions.keys() == report.real_baseline.keys()
    assert report.reconstructions["fd_efficientnet_lite0_10"] > report.real_baseline["fd_efficientnet_lite0_10"]
    assert "reconstructions (N = 10)" in report.table() and "reconstructions<br>N = 10" in render_page(report)


def test_saved_images_are_the_samples_with_their_labels(saved, plain):
    import pyarrow.parquet as pq
    from PIL import Image

    images, labels, _, _ = plain
    rows = pq.read_table(saved / "step_0000004").to_pylist()
    assert [row["index"] for row in rows] == list(range(10))
    assert [row["label"] for row in rows] == labels.tolist() == [sample_label(0, i, 3, "balanced") for i in range(10)]
    import io

    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    assert np.array_equal(pixels, images)
    assert json.loads((saved / "step_0000004" / ".records" / "source.json").read_text())["num_samples"] == 10


def test_repeats_hold_every_seed_and_the_mean(report, called):
    out, _ = called
    name = "fd_efficientnet_lite0_10"
    values = report.repeats[name]
    assert len(values) == 2 and values[0] == report.metrics[name] != values[1]
    mean, error = report.estimate(name)
    assert (mean, error) == pytest.approx((np.mean(values), np.std(values, ddof=1) / 2**0.5))
    assert "step_0000002" in out and "step_0000004" in out


def test_several_checkpoints_give_a_curve_a_best_and_a_champion(config, called):
    out, result = called
    (curve,) = result["curves"]
    assert Path(curve).read_bytes().startswith(b"\x89PNG") and "curve over 2 checkpoints" in out
    values = [
        EvaluationReport.from_json(json.dumps(each)).estimate("fd_efficientnet_lite0_10")[0]
        for each in result["reports"]
    ]
    assert result["best"] == result["reports"][int(np.argmin(values))]["checkpoint"]
    assert "models:/tiny@champion is now version 1" in out
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.name).experiment_id
    runs = client.search_runs([experiment], "tags.`raydit.stage` = 'evaluations'")
    history = client.get_metric_history(runs[0].info.run_id, "eval/fd_efficientnet_lite0_10")
    assert [(point.step, point.value) for point in history] == [(2, values[0]), (4, values[1])]
    assert len(client.search_logged_models([experiment])) == 2


def test_the_page_has_all_pictures(config, report):
    folder = Path(config.folder("evaluations")) / report.protocol_id / "step_0000004"
    assert set(report.artifacts) == {"samples", "classes", "neighbours", "page"}
    assert all((folder / file).is_file() for file in report.artifacts.values())
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png") == 3 and "mean of 2 seeds" in html
    assert set(report.timings) >= {"features_seconds", "scoring_seconds", "workers_sampling_seconds"}
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []  # no shards are left


def test_a_finished_evaluation_is_skipped_without_ray(config, checkpoint, report, saved, raydit, monkeypatch):
    monkeypatch.setattr(StageContext, "start_ray", lambda *_: pytest.fail("Ray was started"))
    _, out, _ = raydit("evaluate", str(checkpoint), "--save-images", str(saved / checkpoint.name))
    assert "already finished" in out  # the folder holds all samples
    code, out, _ = raydit("evaluate", str(checkpoint), "--json")
    assert code == 0 and EvaluationReport.from_json(out.splitlines()[-1]).metrics == report.metrics
    code, out, _ = raydit("evaluate", str(checkpoint), "--dry-run", "--json")
    (plan,) = json.loads(out.splitlines()[-1])["plans"]
    assert code == 0 and plan == {
        "checkpoint": str(checkpoint),
        "protocol_id": report.protocol_id,
        "shards": 3,
        "samples": 10,
        "finished": True,
    }


def test_weights_that_the_checkpoint_lacks_are_refused_before_any_work(config, checkpoint, raydit, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "step_0000004")
    shutil.copytree(Path(config.folder("autoencoder")), tmp_path / "autoencoder")
    averages = ("--set", "train.ema_sigma_rels=[0.1]", "--set", "evaluate.weights=ema_0.1")
    code, _, err = raydit("evaluate", str(tmp_path / "checkpoints" / "step_0000004"), *averages)
    assert code == 2 and "has no weights 'ema_0.1': found ema, model" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "checkpoints"]


def test_reports_are_compared_by_checkpoint_or_file(config, checkpoint, report, raydit, tmp_path):
    save_report(report, str(tmp_path))
    other = str(checkpoint.with_name("step_0000002"))
    code, out, _ = raydit("compare", other, str(checkpoint))
    assert code == 0 and out.startswith("metric") and "step_0000002" in out
    save_report(replace(report, protocol=replace(report.protocol, cfg_scale=1.5)), str(tmp_path / "guided"))
    code, out, err = raydit("compare", str(tmp_path / "report.json"), str(tmp_path / "guided"))
    assert code == 2 and "cfg_scale: 1.0 and 1.5" in err
    code, out, _ = raydit("compare", str(tmp_path), str(tmp_path / "guided"), "--allow-unequal")
    assert code == 0 and "Not comparable: the protocols differ in cfg_scale" in out


def test_evaluations_share_workers_where_all_but_the_seed_is_equal(config, checkpoint):
    """Also where nodes are chosen by labels, which are a dict."""
    opened = open_checkpoint(checkpoint)

    def evaluation(seed, pool):
        evaluate = replace(config.evaluate, label_selector={"pool": pool})
        settings = ScoringSettings.from_recipe(replace(config, seed=seed, evaluate=evaluate))
        return CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings)

    first, other, second = evaluation(0, "a"), evaluation(0, "b"), evaluation(1, "a")
    assert group_by_settings([first, other, second]) == [[first, second], [other]]


@pytest.fixture
def bucket(config, s3_bucket):
    """A bucket with the output, without references and reports."""
    filesystem, inner = storage.resolve(f"{s3_bucket}/out")
    for folder in ("autoencoder", "checkpoints"):
        copy_files(config.folder(folder), f"{inner}/{folder}", LocalFileSystem(), filesystem)
    return s3_bucket


@pytest.mark.slow
@pytest.mark.parametrize("refused", [0.0, 0.1])
def test_an_output_in_a_bucket_gets_the_numbers_of_one_on_disk(
    config, report, bucket, throttled, refused, raydit, local_ray, monkeypatch, tmp_path
):
    """Also if a share of all requests is throttled."""
    monkeypatch.chdir(tmp_path)
    throttled.share = refused
    checkpoint = f"{bucket}/out/checkpoints/step_0000004"
    code, out, err = raydit("evaluate", checkpoint, "--json")
    assert code == 0, err
    found = EvaluationReport.from_json(out.splitlines()[-1])
    assert (found.metrics, found.protocol, found.checkpoint) == (report.metrics, report.protocol, checkpoint)
    folder = f"{bucket}/out/evaluations/{report.protocol_id}/step_0000004"
    assert f"report       {folder}/report.json" in out
    assert set(storage.list_files(folder, recursive=True)) == {"report.json", TIME_FILE, *found.artifacts.values()}
    assert all(name.endswith(".npz") for name in storage.list_files(f"{bucket}/out/references", recursive=True))
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.name).experiment_id
    (run,) = client.search_runs([experiment], f"tags.`raydit.checkpoint` = '{checkpoint}'")
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts >= {"report.json", "report.html", "samples.png"}

    monkeypatch.setattr(StageContext, "start_ray", lambda *_: pytest.fail("Ray was started"))
    code, out, _ = raydit("evaluate", checkpoint, "--json")
    assert code == 0 and EvaluationReport.from_json(out.splitlines()[-1]) == found
    code, out, _ = raydit("compare", checkpoint, f"{folder}/report.json", folder, "--json")
    listed = json.loads(out.splitlines()[-1])["reports"]
    scores = [EvaluationReport.from_json(json.dumps(each)).metrics for each in listed]
    assert code == 0 and scores == 3 * [report.metrics]
    code, out, _ = raydit("lineage", checkpoint, "--quick", "--json")
    links = {link["kind"]: link for link in json.loads(out.splitlines()[-1])["chain"]}
    assert links["evaluation"]["name"] == f"{folder}/report.json" and not links["evaluation"]["broken"]
    assert bool(throttled.refused) == bool(refused)


@pytest.mark.slow
def test_sample_files_references_and_reports_can_lie_in_a_bucket(
    config, report, bucket, raydit, local_ray, monkeypatch, tmp_path
):
    """Samples as ADM's npz, scored as images of another source against a reference that was built there."""
    monkeypatch.chdir(tmp_path)
    rows = ("--set", "evaluate.shard_rows=4")
    samples, reference = f"{bucket}/samples.npz", f"{bucket}/reference.npz"
    for _ in range(2):
        code, out, err = raydit("sample", f"{bucket}/out/checkpoints/step_0000004", "--npz", samples)
    assert code == 2 and f"{samples} exists already" in err
    flags = ["--size", "16", "--extractor", "efficientnet-lite0", "--set", "images.held_out=0.3", *rows]
    code, _, err = raydit("reference", "build", config.images.path, "--out", reference, *flags)
    assert code == 0, err
    (here,) = (path for path in Path(config.folder("references")).glob("*.npz") if "mu" in np.load(path).files)
    assert load_given_reference(reference).digest == load_given_reference(str(here)).digest
    flags = ["--set", f"output={bucket}/images", "--set", f"tracking.uri={config.tracking.uri}", *rows]
    code, out, err = raydit("evaluate", "--images", samples, "--reference", reference, *flags, "--json")
    assert code == 0, err
    metrics = EvaluationReport.from_json(out.splitlines()[-1]).metrics
    assert metrics == {name: pytest.approx(report.metrics[name], rel=1e-9) for name in metrics}
    assert storage.list_names(bucket) == ["images", "out", "reference.npz", "samples.npz"]
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


@pytest.mark.slow
def test_images_of_another_source_get_the_numbers_of_the_samples_that_they_are(
    config, report, saved, plain, raydit, local_ray, tmp_path, monkeypatch
):
    """The samples as ADM's npz and as Parquet, scored against the reference of the evaluation."""
    monkeypatch.chdir(tmp_path)
    images, labels, _, _ = plain
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    (reference,) = (path for path in Path(config.folder("references")).glob("*.npz") if "mu" in np.load(path).files)
    flags = ["--set", f"tracking.uri={config.tracking.uri}", "--set", "evaluate.shard_rows=4", "--json"]
    for source in ("samples.npz", str(saved / "step_0000004")):
        code, out, err = raydit("evaluate", "--images", source, "--reference", str(reference), *flags)
        assert code == 0, err
        metrics = EvaluationReport.from_json(out.splitlines()[-1]).metrics
        assert metrics == {name: pytest.approx(report.metrics[name], rel=1e-9) for name in metrics}
        assert "fd_efficientnet_lite0_10" in metrics


@pytest.mark.slow
def test_a_reference_holds_the_statistics_of_every_image_that_can_be_read(config, local_ray, raydit, tmp_path):
    """Compared with features computed in one process."""
    out = tmp_path / "reference.npz"
    flags = ["--size", "16", "--extractor", "efficientnet-lite0", "--set", "evaluate.shard_rows=30"]
    code, said, err = raydit("reference", "build", config.images.path, "--out", str(out), *flags, "--json")
    assert code == 0, err
    assert json.loads(said.splitlines()[-1])["n"] == 36
    listing = open_source(config.images).listing()
    pixels, good, _ = read_cropped(config.images, listing.keys)
    features = create_extractor("efficientnet-lite0")(torch.from_numpy(pixels).permute(0, 3, 1, 2)).features
    with np.load(out) as file:
        assert file["keys"].tolist() == [listing.keys[position] for position in good]
        np.testing.assert_allclose(file["features"], features, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(file["mu"], file["features"].astype(np.float64).mean(axis=0), atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]
    code, _, err = raydit("reference", "build", config.images.path, "--out", str(out), *flags)
    assert code == 2 and "reference.npz exists already" in err


@pytest.mark.slow
def test_the_images_of_an_adm_reference_serve_precision_and_recall(config, plain, local_ray, tmp_path):
    """The file has mean, covariance and images, but no features."""
    images, _, features, _ = plain
    np.savez(tmp_path / "adm.npz", mu=np.zeros(1280), sigma=np.eye(1280), arr_0=images)
    recipe = replace(config, output=str(tmp_path), evaluate=replace(config.evaluate, reference=f"{tmp_path}/adm.npz"))
    settings = ScoringSettings.from_recipe(recipe)
    real = RealImages(settings, *(listing.take([]) for listing in open_source(config.images).listing().split(0.5)))
    assert load_real_features(real)[0].features is None
    with StageContext(recipe) as context:
        extract_adm_images(real, context)
    np.testing.assert_allclose(load_real_features(real)[0].features, features, rtol=1e-5, atol=2e-5)
