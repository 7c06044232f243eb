"""Samples of a broken checkpoint: refused, or marked so that it cannot win."""

import numpy as np
import pytest
import torch
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.extractors import Features
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.scoring.reports.build_report import build_report, find_defect
from pipelines.scoring.workers.actors import SampleActor, SampleSource
from pipelines.scoring.workers.shards import make_shards

PROTOCOL = EvaluationProtocol(
    num_samples=12,
    sampler="euler",
    sampling_steps=2,
    decoder="",
    extractor="e",
    extractor_sha256="s",
    reference_digest="",
)


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    """A worker that holds a checkpoint, and its first shard of four samples."""
    folder = tmp_path_factory.mktemp("defects")
    config = tiny_output(folder)
    source = SampleSource(str(write_checkpoint(config, 2).path), PROTOCOL)
    (shard, *_) = make_shards(str(folder / "shards"), [range(4)])
    worker = SampleActor(config.evaluate, [source])
    worker.open_sampler(source)
    return worker, worker.open_sampler(source), shard


def test_samples_of_a_single_colour_are_counted(actor, monkeypatch):
    worker, sampler, shard = actor
    assert worker.compute(shard).num_constant == 0
    images = np.zeros((4, 16, 16, 3), np.uint8)
    images[1] = (200, 10, 10)
    images[3, 5, 5, 2] = 1
    monkeypatch.setattr(sampler, "sample", lambda indices, labels: images)
    assert worker.compute(shard).num_constant == 3


def test_a_sample_that_is_not_finite_is_refused_by_its_number(actor, monkeypatch):
    worker, sampler, shard = actor

    def overflow(x, t, y):
        return torch.where((y.labels == 2)[:, None, None, None], torch.inf, torch.zeros_like(x))

    monkeypatch.setattr(sampler, "model", overflow)
    labels = sampler.labels(range(4)).tolist()
    message = f"step_0000002: sample {labels.index(2)} is NaN or infinite, and {labels.count(2)} of 4 samples"
    with pytest.raises(ValueError, match=message):
        worker.compute(shard)


def test_an_autoencoder_that_decodes_to_nan_is_blamed(actor, monkeypatch):
    _, sampler, shard = actor
    bias = sampler.autoencoder.module.decoder.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(ValueError, match="the autoencoder decodes finite latents to NaN"):
        sampler.sample(range(4), sampler.labels(range(4)))


def test_a_report_says_that_its_checkpoint_can_never_win():
    rng = np.random.default_rng(0)
    features, real = rng.normal(size=(12, 4)), rng.normal(size=(20, 4))
    reference = ReferenceStatistics(
        n=20, mu=real.mean(axis=0), sigma=np.cov(real.T), features=real, extractor="e", extractor_sha256="s"
    )

    def report(num_constant):
        samples = Features(features)
        return build_report(PROTOCOL, samples, reference, None, checkpoint="c", digest="d", num_constant=num_constant)

    sound, defective = report(6), report(7)
    assert sound.disqualified == "" and "disqualified" not in sound.to_json()
    assert defective.disqualified == "7 of 12 samples are of a single colour"
    assert defective.metrics == sound.metrics
    assert defective.warnings[0].endswith("this can be neither the best checkpoint nor a champion.")
    assert EvaluationReport.from_json(defective.to_json()) == defective
    assert find_defect(np.repeat(features[:1], 5, axis=0), 0) == "all 5 samples have the same features"
