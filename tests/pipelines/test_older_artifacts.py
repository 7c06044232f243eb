"""What commit 707a9da left on storage: today's code opens it, resumes it and scores it again.

Identities must be equal exactly. Weights and scores agree to 1e-3, because bits are those of one kind of processor.
"""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.artifacts import Artifact
from pipelines.autoencoder import autoencoder_identity
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.reader import load_recipe, resolved
from pipelines.encode import encode
from pipelines.evaluate import evaluate
from pipelines.images.open import open_source
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.identity import encode_identity
from pipelines.latents.verify import verify
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.settings import ScoringSettings
from pipelines.training.group.worker import Worker
from pipelines.training.loop import train_worker
from pipelines.training.settings import train_worker_settings
from pipelines.training.starting.identity import train_identity

GOLDEN = Path(__file__).parents[1] / "golden"
FINGERPRINT = "2590c5d956abcf99588d756ba3d416516191120ac4402cce8fa211ecc6196a97"
CHECKPOINT = "e933a27da33ee8f4dc2659e6f10fa382e77d50faba91e4222130865f7f025f73"
PROTOCOL = "7bf624e4d275"
REFERENCE = "0fd86b7a902746b6774a942a5b8ba24d6e092caea4634f7fd9acaad5e7b86c94"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    with zipfile.ZipFile(GOLDEN / "707a9da" / "artifacts.zip") as archive:
        archive.extractall(folder)
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace("@FOLDER@", str(folder)))
    return folder


@pytest.fixture
def recipe(folder, monkeypatch):
    """The recipe, in whose working directory the artifacts lie: its paths are relative, as they were then."""
    monkeypatch.chdir(folder)
    return load_recipe(GOLDEN / "artifacts.toml", (f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",))


def test_no_identity_has_changed(recipe, folder, tmp_path):
    listing, _ = open_source(recipe.images).listing().split(recipe.images.held_out)
    latents = LatentDataset.open(recipe.latents)
    assert recipe.autoencoder.train is not None
    identities = {
        "autoencoder": autoencoder_identity(recipe, recipe.autoencoder.train, listing),
        "latents": encode_identity(recipe.images, recipe.encode, listing, autoencoder_of(recipe).describe()),
        "checkpoints": train_identity(recipe, latents),
    }
    for name, identity in identities.items():
        assert Artifact(name, recipe.folder(name), identity).changes() == [], name
        Artifact(name, str(tmp_path / "new" / name), identity).prepare()
        written, recorded = tmp_path / "new" / name / "plan.json", folder / "output" / name / "plan.json"
        assert written.read_bytes() == recorded.read_bytes()
    assert latents.fingerprint == FINGERPRINT
    checkpoint = open_checkpoint("output/checkpoints/step_0000006")
    assert checkpoint.digest == CHECKPOINT
    assert evaluation_protocol(ScoringSettings.from_recipe(recipe), checkpoint).protocol_id == PROTOCOL


def test_its_recipe_is_recorded_with_the_same_fields(folder):
    recorded = json.loads((folder / "output" / "checkpoints" / "step_0000006" / "config.json").read_text())["recipe"]
    assert json.loads(json.dumps(resolved(load_recipe(GOLDEN / "artifacts.toml")))) == recorded


def test_its_latents_are_whole_and_not_encoded_again(recipe):
    files = {file.name: file.read_bytes() for file in Path(recipe.latents).glob("*.*")}
    dataset = encode(recipe)
    assert {file.name: file.read_bytes() for file in Path(recipe.latents).glob("*.*")} == files
    checks = list(verify(dataset))
    assert [check for check in checks if not check.ok] == []
    assert "decode to" in checks[-1].found  # compared with the autoencoder and the images


def test_its_training_resumes_to_its_own_last_checkpoint(recipe, folder):
    finished = Path(recipe.folder("checkpoints"))
    expected = folder / "finished"
    shutil.copytree(finished, expected)
    shutil.rmtree(finished / "step_0000006")
    messages: list = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = train_worker_settings(recipe, LatentDataset.open(recipe.latents))
        train_worker(Worker(0, 1, torch.device("cpu"), messages.append), settings)
    finally:
        torch.set_num_threads(threads)
        resumed = folder / "resumed"
        shutil.move(finished, resumed)
        shutil.move(expected, finished)
    old, new = finished / "step_0000006", resumed / "step_0000006"
    for name in ("model.safetensors", "ema.safetensors", "trainer/optimizer.safetensors"):
        before, after = load_file(old / name), load_file(new / name)
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-5)
    told, tell = (json.loads((path / "config.json").read_text()) for path in (old, new))
    for config in (told, tell):  # where the store lies is the one thing that this test sets differently
        del config["recipe"]["tracking"]
    assert tell == told
    states = [json.loads((path / "trainer" / "state.json").read_text()) for path in (old, new)]
    losses = [[report["metrics"]["loss"] for report in state.pop("reports")] for state in states]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and states[0] == states[1]


def test_its_report_reads_and_writes_back_to_the_same_bytes(folder):
    (file,) = (folder / "output" / "evaluations").rglob("report.json")
    text = file.read_text()
    assert EvaluationReport.from_json(text).to_json() == text


@pytest.mark.slow
def test_scored_again_its_checkpoint_has_its_scores(recipe, folder, local_ray):
    (file,) = (folder / "output" / "evaluations").rglob("report.json")
    recorded = EvaluationReport.from_json(file.read_text())
    report = evaluate("output/checkpoints/step_0000006", config=recipe, force=True)
    assert (report.protocol, report.checkpoint_digest) == (recorded.protocol, recorded.checkpoint_digest)
    assert report.metrics == pytest.approx(recorded.metrics, rel=1e-3)
    assert report.errors == pytest.approx(recorded.errors, rel=1e-3)
    assert report.real_baseline == pytest.approx(recorded.real_baseline, rel=1e-3)


def test_its_reference_opens_with_its_digest():
    with open(GOLDEN / "707a9da" / "reference.npz", "rb") as file:
        reference = ReferenceStatistics.load(file, "reference.npz")
    assert reference.digest == REFERENCE
    features = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    np.testing.assert_array_equal(reference.features, features)
    np.testing.assert_allclose(reference.sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
