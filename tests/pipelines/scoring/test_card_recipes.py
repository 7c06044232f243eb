"""The recipe of a card asks for all that its report has, also for what no protocol says."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.merge_reports import merge_reports
from evaluation.per_class import ClassDistance
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.reader import validate_recipe
from pipelines.scoring.cards import make_card
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol, evaluation_protocols
from pipelines.scoring.settings import ScoringSettings

FD, MIND = "fd_efficientnet_lite0_16", "mind_efficientnet_lite0_16"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A checkpoint whose recipe asks for no reconstructions, and for a metric."""
    settings = ("evaluate.reconstructions=false", 'evaluate.metrics=["cmmd"]')
    config = tiny_output(tmp_path_factory.mktemp("cards"), *settings)
    return open_checkpoint(Path(write_checkpoint(config, 2).path))


@pytest.fixture
def report(opened):
    protocol = evaluation_protocol(ScoringSettings.from_recipe(checkpoint_recipe(opened)), opened)
    return EvaluationReport(
        protocol=protocol, checkpoint=opened.origin, checkpoint_digest=opened.digest, metrics={FD: 3.0}
    )


def published(report, *overrides):
    """The [evaluate] of a card's recipe."""
    return validate_recipe(make_card(report, overrides=overrides).recipe).evaluate


def test_further_metrics_are_those_of_the_report_also_where_they_are_missing(report):
    with_mind = replace(report, metrics={FD: 3.0, MIND: 1.0}, missing={"rbf_mmd_efficientnet_lite0_16": "no features"})
    assert set(published(with_mind).metrics) == {"mind", "rbf_mmd"}
    assert published(report).metrics == ()


def test_reconstructions_are_made_if_the_report_has_them(report):
    made = replace(report, reconstructions={FD: 2.0})
    assert published(made).reconstructions is not False and published(report).reconstructions is False
    assert published(made, "evaluate.reconstructions=true").reconstructions is True
    assert published(report, "evaluate.reconstructions=true").reconstructions is False


def test_distances_of_classes_are_those_of_any_extractor(report, opened):
    both = checkpoint_recipe(opened, ('evaluate.extractors=["efficientnet-lite0","inception"]',))
    _, second = evaluation_protocols(ScoringSettings.from_recipe(both), report.protocol)
    classes = [ClassDistance(name="ring", num_samples=5, num_real=5, metric="kid", value=0.1)]
    other = replace(report, protocol=second, metrics={"fid_16": 1.0})
    for parts in ([report, other], [report, replace(other, per_class=classes)], [replace(report, per_class=classes)]):
        assert bool(published(merge_reports(parts)).per_class) == any(part.per_class for part in parts)
