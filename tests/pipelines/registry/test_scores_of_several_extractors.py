"""MLflow knows the scores of several extractors, each by the protocol that a run with its extractor alone has."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow_server import wait_until
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.merge_reports import merge_reports
from evaluation.ratios import mean_ratio_id
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry.best import best_checkpoints
from pipelines.registry.queries import find_protocol, list_runs
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.reports.log_report import log_report
from pipelines.scoring.reports.report_files import save_report
from pipelines.scoring.score_checkpoint import CheckpointEvaluation, run_tags
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext
from pipelines.tracking.experiment_page import VIEW_TAG, read_content
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.training.monitoring.retention import best_step

EXPERIMENT = "several"
SECOND = "dinov2-vit-s-14"
LITE0_FD, DINOV2_FD = "fd_efficientnet_lite0_16", "fd_dinov2_vit_s_14_16"
MEAN = "fdr_16"
SCORES = {2: (30.0, 500.0), 4: (20.0, 600.0)}
"""By step: the better checkpoint depends on the extractor."""


class Told(NamedTuple):
    uri: str
    evaluations: str
    first_id: str
    second_id: str
    client: MlflowClient
    experiment: object
    digests: dict[int, str]
    """Digests of the checkpoints by step."""


@pytest.fixture(scope="module")
def told(story, tmp_path_factory):
    """A training whose checkpoint 2 was scored by both extractors, and 4 by the second alone and then by both."""
    config = tiny_output(tmp_path_factory.mktemp("several"), f"name={EXPERIMENT}", f"tracking.uri={story.uri}")
    settings, checkpoints = (
        ScoringSettings.from_recipe(config),
        {step: write_checkpoint(config, step) for step in SCORES},
    )
    with StageContext(config) as context:
        with context.run("train", {}) as run:
            for checkpoint in checkpoints.values():
                log_checkpoint(run, checkpoint)
        for step, checkpoint in checkpoints.items():
            opened = open_checkpoint(checkpoint.path)
            first = evaluation_protocol(settings, opened)
            second = replace(first, extractor=SECOND, extractor_sha256="s", reference_digest="r2")
            one, two = (
                EvaluationReport(
                    protocol=protocol,
                    checkpoint=opened.origin,
                    checkpoint_digest=opened.digest,
                    metrics={name: value, f"ratio_{name}": value / 10},
                    errors={name: 0.5},
                    deviations={f"ratio_{name}": [[1.0, -1.0], [0.0, 0.0]]},
                )
                for protocol, name, value in zip((first, second), (LITE0_FD, DINOV2_FD), SCORES[step], strict=True)
            )
            for report in ([two] if step == 4 else []) + [merge_reports([one, two])]:
                folder = CheckpointEvaluation(opened, report.protocol, settings).folder
                save_report(report, folder)
                identity = {"checkpoint": opened.digest, "protocol": report.protocol_id}
                with context.run("evaluate", identity, run_tags(opened, report.protocol)) as run:
                    log_checkpoint(run, opened, opened.origin)
                    log_report(run, report, folder, opened.step, opened.digest)
        wait_until(lambda: not context.tracker._journal.undelivered)
    client = MlflowClient(story.uri)
    ids = first.protocol_id, second.protocol_id
    digests = {step: checkpoint.digest for step, checkpoint in checkpoints.items()}
    return Told(story.uri, settings.evaluations, *ids, client, client.get_experiment_by_name(EXPERIMENT), digests)


def test_checkpoints_are_ranked_by_the_protocol_of_the_metrics_extractor(told):
    first = best_checkpoints(told.uri, EXPERIMENT, metric=LITE0_FD)
    second = best_checkpoints(told.uri, EXPERIMENT, metric=DINOV2_FD)
    assert (first["protocol_id"], second["protocol_id"]) == (told.first_id, told.second_id)
    assert first["protocol"].endswith(", efficientnet-lite0") and second["protocol"].endswith(f", {SECOND}")
    assert [score["step"] for score in first["checkpoints"]] == [4, 2]
    assert [score["step"] for score in second["checkpoints"]] == [2, 4]
    assert {score["reference"] for score in second["checkpoints"]} == {"r2"}
    assert first["checkpoints"][0]["reference"] not in ("", "r2")
    assert [score["error"] for score in second["checkpoints"]] == [0.5, 0.5]


def test_checkpoints_are_ranked_by_ratios_and_by_their_mean(told):
    mean = best_checkpoints(told.uri, EXPERIMENT, metric=MEAN)
    assert mean["protocol_id"] == mean_ratio_id([told.second_id, told.first_id])
    assert mean["protocol"].endswith(f", mean of efficientnet-lite0 and {SECOND}") and not mean["other_protocols"]
    assert [(score["step"], score["value"]) for score in mean["checkpoints"]] == [(2, 26.5), (4, 31.0)]
    assert [score["error"] for score in mean["checkpoints"]] == [1.0, 1.0]
    ratio = best_checkpoints(told.uri, EXPERIMENT, metric=f"ratio_{LITE0_FD}")
    assert (ratio["protocol_id"], [score["step"] for score in ratio["checkpoints"]]) == (told.first_id, [4, 2])


def test_ratios_to_other_held_out_images_are_not_ranked_together(told):
    """The reference was given, so that the protocol does not say which images are held out."""
    ratio = f"ratio_{LITE0_FD}"
    runs = {each["step"]: each["run"] for each in best_checkpoints(told.uri, EXPERIMENT, metric=ratio)["checkpoints"]}
    assert sorted(runs) == [2, 4]
    try:
        for step, run in runs.items():
            told.client.set_tag(run, "raydit.held_out_digest", str(step))
        assert len(best_checkpoints(told.uri, EXPERIMENT, metric=ratio)["checkpoints"]) == 1
        assert len(best_checkpoints(told.uri, EXPERIMENT, metric=LITE0_FD)["checkpoints"]) == 2
    finally:
        for run in runs.values():
            told.client.delete_tag(run, "raydit.held_out_digest")


def test_the_first_extractor_leads_where_none_is_asked_for(told):
    assert best_checkpoints(told.uri, EXPERIMENT)["metric"] == LITE0_FD
    shown = [run["metrics"] for run in list_runs(told.uri, experiment=EXPERIMENT, stage="evaluate")]
    assert shown == [{f"eval/{LITE0_FD}": 20.0}, {f"eval/{DINOV2_FD}": 600.0}, {f"eval/{LITE0_FD}": 30.0}]
    assert read_content(told.experiment.tags[VIEW_TAG]).score == f"eval/{LITE0_FD}"


def test_each_metric_is_logged_with_its_own_protocol_and_reference(told):
    models = told.client.search_logged_models([told.experiment.experiment_id])
    found = {(point.key, point.dataset_digest) for model in models for point in model.metrics if "eval/" in point.key}
    single = {(name, digest) for name, digest in found if name != f"eval/{MEAN}"}
    assert single == {
        (f"eval/{prefix}{name}", protocol_id)
        for prefix in ("", "ratio_")
        for name, protocol_id in ((LITE0_FD, told.first_id), (DINOV2_FD, told.second_id))
    }
    assert found - single == {(f"eval/{MEAN}", mean_ratio_id([told.first_id, told.second_id]))}
    (both,) = told.client.search_runs(
        [told.experiment.experiment_id], f"tags.`raydit.protocol_id` = '{told.first_id}'", max_results=1
    )
    ids = {"efficientnet-lite0": told.first_id, SECOND: told.second_id}
    assert json.loads(both.data.tags["raydit.protocols"]) == ids
    inputs = {read.dataset.name: read.dataset.digest for read in both.inputs.dataset_inputs}
    assert inputs[f"reference-{SECOND}"] == "r2" and inputs["reference"] != "r2"


def test_the_training_has_each_score_under_its_protocol(told):
    (train,) = told.client.search_runs([told.experiment.experiment_id], "tags.`raydit.stage` = 'train'")
    ids = {LITE0_FD: told.first_id, DINOV2_FD: told.second_id}
    ids |= {f"ratio_{name}": protocol_id for name, protocol_id in ids.items()}
    ids[MEAN] = mean_ratio_id([told.first_id, told.second_id])
    tags = {name: value.split() for name, value in train.data.tags.items() if name.startswith("raydit.scores.")}
    assert {name: tag.removeprefix("raydit.scores.") for tag, names in tags.items() for name in names} == ids
    assert (train.data.metrics[f"eval/{LITE0_FD}"], train.data.metrics[f"eval/{DINOV2_FD}"]) == SCORES[4]


def test_a_further_protocol_is_described_by_a_run_that_scored_by_it(told):
    assert find_protocol(told.client, told.second_id).endswith(f", {SECOND}")
    assert find_protocol(told.client, told.first_id).endswith(", efficientnet-lite0")
    assert find_protocol(told.client, "0" * 12) == ""


def test_the_best_checkpoint_to_keep_is_that_of_the_metrics_extractor(told):
    metrics = (LITE0_FD, DINOV2_FD, MEAN, f"ratio_{LITE0_FD}")
    assert [best_step(told.evaluations, metric, told.digests) for metric in metrics] == [4, 2, 2, 4]
