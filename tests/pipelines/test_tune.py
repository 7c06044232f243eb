"""A search on a real Ray: its distances are those of evaluations, its protocol is one, and it goes on after a stop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster import storage
from evaluation.metrics import frechet_distance_of
from pipelines.checkpoints.open import open_checkpoint
from pipelines.cli.main import cli
from pipelines.scoring.real_images.references import RealImages, load_real_features
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.tuning import candidates
from pipelines.tune import SEED_OFFSET, TuneResult

pytestmark = pytest.mark.slow
SAMPLES = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    settings = (f"evaluate.num_samples={SAMPLES}", "evaluate.shard_rows=10", "evaluate.batch_size=10")
    config = tiny_output(tmp_path_factory.mktemp("tuned"), *settings)
    write_checkpoint(config, 2)
    return config


@pytest.fixture(scope="module")
def command(config):
    checkpoint = Path(config.folder("checkpoints")) / "step_0000002"
    return ["tune", str(checkpoint), "--cfg-scale", "1,2,8", "--weights", "ema,raw", "--budget", "0.9", "--json"]


@pytest.fixture(scope="module")
def found(command, local_ray):
    """The content of tune.json, as the command printed it after it was stopped once."""
    ran = candidates.compute_shards

    def stop_after(*arguments):
        ran(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(candidates, "compute_shards", stop_after)
        assert CliRunner().invoke(cli, command).exit_code != 0
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output.splitlines()[-1])


def test_every_candidate_is_measured_and_the_best_is_the_lowest(found):
    assert len(found["candidates"]) == 6
    assert [len(entry["rungs"]) > 0 for entry in found["candidates"]] == [True] * 6
    last = [entry["rungs"][-1] for entry in found["candidates"]]
    finalists = [rung for rung in last if rung["num_samples"] == found["num_samples"]]
    assert min(rung["predicted"] for rung in finalists) == last[found["best"]]["predicted"]
    assert found["spent"] <= 0.9


def test_a_distance_is_that_of_the_samples_of_a_plain_loop(found, config, command):
    """With the seed of the search, which is not the recipe's."""
    entry = found["candidates"][found["best"]]
    rung = entry["rungs"][0]
    evaluate = replace(
        config.evaluate, cfg_scale=entry["cfg_scale"], weights=entry["weights"], num_samples=rung["num_samples"]
    )
    settings = ScoringSettings.from_recipe(replace(config, seed=config.seed + SEED_OFFSET, evaluate=evaluate))
    opened = open_checkpoint(command[1])
    reference, _ = load_real_features(RealImages.of(settings))
    features = sampled_features(settings, opened, rung["num_samples"])
    assert rung["distance"] == pytest.approx(frechet_distance_of(reference.mu, reference.sigma)(features), rel=1e-6)


def sampled_features(settings, opened, count):
    import torch

    from evaluation.extractors import create_extractor
    from pipelines.scoring.protocols.build_protocol import evaluation_protocol

    torch.set_num_threads(settings.evaluate.cpus_per_worker)
    protocol = evaluation_protocol(settings, opened)
    sampler = CheckpointSampler(opened.path, protocol, batch_size=settings.evaluate.batch_size)
    images = sampler.sample(range(count), sampler.labels(range(count)))
    return create_extractor(settings.evaluate.extractor)(torch.from_numpy(images).permute(0, 3, 1, 2)).features


def test_the_protocol_file_scores_by_the_settings_found(found, command):
    best = found["candidates"][found["best"]]
    result = CliRunner().invoke(
        cli, ["evaluate", command[1], "--protocol", found["protocol"], "--json"], catch_exceptions=False
    )
    report = json.loads(result.output.splitlines()[-1])
    protocol = report["protocol"]
    assert [protocol[name] for name in ("cfg_scale", "weights", "num_samples")] == [
        best["cfg_scale"],
        best["weights"],
        SAMPLES,
    ]
    assert protocol["seed"] + SEED_OFFSET == found["seed"]


def test_a_finished_search_is_returned_and_leaves_no_records(found, command):
    assert not storage.exists(storage.join(found["folder"], "records"))
    again = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "already finished" in again.output
    assert json.loads(again.output.splitlines()[-1]) == found
    result = TuneResult(found["folder"], storage.read_json(storage.join(found["folder"], "tune.json")))
    assert Image.open(Path(result.folder) / "tune.png").width > 300


def test_a_plan_names_every_candidate_and_starts_nothing(command, found):
    result = CliRunner().invoke(cli, [*command, "--dry-run"], catch_exceptions=False)
    assert result.output.count("candidate ") == 6
    assert json.loads(result.output.splitlines()[-1])["samples"] == [20, 60]
