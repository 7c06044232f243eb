"""Several extractors score the same samples, each as a run with it alone does."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from second_extractor import SECOND, write_second_weights
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster import storage
from evaluation.extractors import extractor_macs
from evaluation.merge_reports import merge_reports
from evaluation.per_class import ClassDistance
from evaluation.plots.precision_recall import PrecisionRecall
from evaluation.report import EvaluationReport
from pipelines.build_reference import build_reference
from pipelines.checkpoints.open import open_checkpoint
from pipelines.cli.submission.paths import relative_recipe_paths
from pipelines.config.reader import RecipeError, load_recipe, resolved, validate_recipe
from pipelines.evaluate import find_report
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.networks import resolve_networks
from pipelines.planning.time import evaluate_work
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.reports.report_curves import _precision_recall as precision_recall
from pipelines.scoring.reports.report_files import find_reports, save_report
from pipelines.scoring.score_checkpoint import CheckpointEvaluation
from pipelines.scoring.score_extractors import with_earlier_scores
from pipelines.scoring.seeds import with_repeats
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.records import ShardResult
from pipelines.scoring.workers.shards import find_unfinished
from raydit.errors import InvalidInput, NotFound

FIRST = "efficientnet-lite0"
BOTH = f'evaluate.extractors=["{FIRST}","{SECOND}"]'


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_second_weights(tmp_path_factory.mktemp("weights") / "second.pth")


@pytest.fixture(scope="module")
def config(tmp_path_factory, weights):
    """A recipe of two extractors for ten samples of one Euler step, with a checkpoint in its output."""
    settings = ("evaluate.num_samples=10", "evaluate.shard_rows=4", "evaluate.batch_size=4", BOTH)
    table = f'evaluate.extractor_weights={{"{SECOND}"="{weights}"}}'
    config = tiny_output(tmp_path_factory.mktemp("several"), *settings, table)
    write_checkpoint(config, 2)
    return config


@pytest.fixture(scope="module")
def opened(config):
    return open_checkpoint(Path(config.folder("checkpoints")) / "step_0000002")


def alone(config, extractor):
    """The recipe with one extractor, as it was written before there could be several."""
    paths = {"extractor_weights": (config.evaluate.extractor_weights or {}).get(extractor)}
    return replace(config, evaluate=replace(config.evaluate, extractor=extractor, extractors=(), **paths))


def planned(config, opened):
    settings = ScoringSettings.from_recipe(config)
    return CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings)


def scores_of(protocol, checkpoint, digest, value=1.0):
    name = f"fd_{protocol.extractor.replace('-', '_')}_10"
    return EvaluationReport(protocol=protocol, checkpoint=checkpoint, checkpoint_digest=digest, metrics={name: value})


def test_each_protocol_is_that_of_a_run_with_its_extractor_alone(config, opened):
    evaluation = planned(config, opened)
    expected = [planned(alone(config, name), opened).protocol for name in (FIRST, SECOND)]
    assert evaluation.protocols == expected and len({each.protocol_id for each in expected}) == 2
    assert evaluation.protocols[1].extractor.startswith(f"{SECOND}-")  # weights other than the published ones
    swapped = replace(config.evaluate, extractor=SECOND, extractors=(SECOND, FIRST))
    assert planned(replace(config, evaluate=swapped), opened).protocols == expected[::-1]


def test_a_list_of_one_is_that_extractor_alone(config, opened):
    one = planned(replace(config, evaluate=replace(config.evaluate, extractors=(FIRST,))), opened)
    before = planned(alone(config, FIRST), opened)
    assert (one.protocols, one.folder) == (before.protocols, before.folder)
    assert one.shards() == before.shards()


def test_images_are_sampled_and_read_once_and_records_are_those_of_one_extractor(config, opened, tmp_path, monkeypatch):
    """To the byte, but for durations; the further record has nothing that the first one has of the samples."""
    evaluation, settings = planned(config, opened), ScoringSettings.from_recipe(config)
    sampled = []
    compute = ScoringActor.compute
    monkeypatch.setattr(ScoringActor, "compute", lambda self, shard: sampled.append(shard) or compute(self, shard))
    samples, real = evaluation.shards()[2], RealImages.of(settings).missing_shards()[-1]
    actor = ScoringActor(config.images, config.evaluate, [evaluation.source])
    for shard in (samples, real):
        actor(shard)
    assert len(sampled) == 1 and len(samples.records) == len(real.records) == 2
    for position, name in enumerate((FIRST, SECOND)):
        config_alone = alone(config, name)
        single = ScoringActor(config.images, config_alone.evaluate, [planned(config_alone, opened).source])
        for index, shard in enumerate((samples, real)):
            file = str(tmp_path / f"{position}-{index}.npz")
            single(replace(shard, file=file, extractor=0, further=()))
            found, expected = (read(each) for each in (dict(shard.records)[position], file))
            if position and index == 0:
                expected = {key: value for key, value in expected.items() if key not in ("images", "num_constant")}
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[key], expected[key]) for key in found)
    assert read(samples.file)["images"].shape == (2, 16, 16, 3)
    assert "images" not in read(dict(samples.records)[1])


def read(file):
    """The arrays of a record, but for durations."""
    with storage.open_file(file) as opened:
        record = vars(ShardResult.read(opened))
    return {key: value for key, value in record.items() if value is not None and not key.endswith("_seconds")}


def test_a_shard_is_finished_when_every_extractor_has_its_record(config, opened, tmp_path):
    shards = planned(replace(config, output=str(tmp_path / "new")), opened).shards()
    assert find_unfinished(shards) == shards
    for _, file in (shards[0].records[0], *shards[1].records):
        storage.write_atomically(file, b"")
    assert find_unfinished(shards) == [shards[0], shards[2]]


def test_only_the_extractors_without_features_read_the_real_images(config):
    real = RealImages.of(replace(ScoringSettings.from_recipe(config), output=str(Path(config.output) / "other")))
    first, _ = real.each_extractor
    before = real.missing_shards()
    assert {len(shard.records) for shard in before} == {2}
    storage.write_atomically(first.path(real.training), b"")
    shards = real.missing_shards()
    reading = [shard for shard in shards if len(shard.records) == 1]
    assert len(shards) == len(before) and {shard.extractor for shard in reading} == {1}
    assert sum(len(shard.images) for shard in reading) == len(real.training)
    assert [shard.file for shard in reading] == [shard.file for shard in real.each_extractor[1].shards(real.training)]


def test_a_report_counts_as_finished_for_the_extractors_that_it_has(config, opened):
    """Asked for one of two, both count; asked for two of one, that one does not; each lies in its first's folder."""
    both = planned(config, opened)
    first, second = (planned(alone(config, name), opened) for name in (FIRST, SECOND))
    one, other = (scores_of(each, opened.origin, opened.digest) for each in both.protocols)
    save_report(one, first.folder)
    assert (both.folder, both.find_report(), first.find_report()) == (first.folder, None, one)
    save_report(merge_reports([one, other]), both.folder)
    assert both.find_report() == first.find_report() == find_report(opened, config) == merge_reports([one, other])
    assert second.find_report() is None and second.folder != both.folder


def test_reports_are_found_by_the_protocol_of_any_extractor(config, opened):
    reports = [scores_of(each, opened.origin, opened.digest) for each in planned(config, opened).protocols]
    merged = merge_reports(reports)
    save_report(merged, planned(config, opened).folder)
    ids = [report.protocol_id for report in reports]
    assert find_reports([opened.origin]) == find_reports([opened.origin], protocol_id=ids[0]) == [merged]
    for name in (opened.origin, planned(config, opened).folder):
        assert find_reports([name], protocol_id=ids[1]) == [reports[1]]
    folder = planned(config, opened).folder
    for name in (opened.origin, folder, f"{folder}/report.json"):
        with pytest.raises(NotFound, match=f"no report of protocol wrong, expected one of {ids[0]} .*{ids[1]}"):
            find_reports([name], protocol_id="wrong")


def test_scores_of_other_extractors_are_kept(config, opened):
    one, other = (scores_of(each, "c", "d") for each in planned(config, opened).protocols)
    again = replace(one, metrics=dict.fromkeys(one.metrics, 2.0))
    assert with_earlier_scores(again, merge_reports([one, other])) == merge_reports([again, other])
    newer = replace(other, protocol=replace(other.protocol, reference_digest="grown"))
    found = with_earlier_scores(merge_reports([again, newer]), merge_reports([one, other]))
    assert found == merge_reports([again, newer])  # not twice by one extractor
    assert with_earlier_scores(again, None) == again
    assert list(with_repeats([merge_reports([one, other]), again]).repeats) == list(one.metrics)


def with_more(report, value=1.0):
    """The report with all that a later evaluation may not ask for."""
    stem = report.headline.removeprefix("fd_")
    mind, missing, smaller = f"mind_{stem}", f"rbf_mmd_{stem}", f"fd_{stem.replace('_10', '_5')}"
    metrics = {**report.metrics, mind: value, smaller: 9.0, f"ratio_{smaller}": 2 * value}
    return replace(
        report,
        metrics=metrics,
        errors={mind: 0.1},
        real_baseline={mind: 0.5, smaller: 8.0},
        missing={missing: "no spread"},
        repeats={name: [first, first + 1, first + 2] for name, first in metrics.items()},
        per_class=[ClassDistance(name="ring", num_samples=3, num_real=9, reason="few")],
        reconstructions={report.headline: 0.7},
    )


def test_a_later_evaluation_deletes_nothing_of_the_same_protocol(config, opened):
    """One without the metrics, by an extractor more: it has a ratio of as many images as are held out today."""
    one, other = (scores_of(each, "c", "d") for each in planned(config, opened).protocols)
    found = with_earlier_scores(merge_reports([one, other]), with_more(one)).parts
    mind = f"mind_{one.headline.removeprefix('fd_')}"
    kept = {"metrics": {**one.metrics, mind: 1.0}, "errors": {mind: 0.1}, "real_baseline": {mind: 0.5}}
    kept["repeats"] = {name: [1.0, 2.0, 3.0] for name in kept["metrics"]}
    shared = {name: getattr(with_more(one), name) for name in ("missing", "per_class", "reconstructions")}
    assert found == [replace(one, **kept, **shared), other]
    alone = with_earlier_scores(one, merge_reports([with_more(one), with_more(other)]))
    assert alone.parts == [found[0], with_more(other)]
    assert with_earlier_scores(with_more(one, 2.0), with_more(one)).metrics == with_more(one, 2.0).metrics


def test_repeats_of_other_samples_are_not_kept(config, opened):
    one, _ = (scores_of(each, "c", "d") for each in planned(config, opened).protocols)
    again = replace(one, metrics=dict.fromkeys(one.metrics, 1.5))
    assert with_earlier_scores(again, with_more(one)).repeats == {}
    grown = replace(one, protocol=replace(one.protocol, reference_digest="grown"))
    assert with_earlier_scores(grown, with_more(one)) == grown


def test_repeats_of_a_mean_ratio_are_kept_over_the_same_extractors(config, opened):
    one, other = (with_more(scores_of(each, "c", "d")) for each in planned(config, opened).protocols)
    both = merge_reports([one, other])
    assert both.metrics["fdr_5"] == 2.0
    earlier = replace(both, repeats={**both.repeats, "fdr_5": [2.0, 4.0]})
    again = merge_reports([replace(each, repeats={}) for each in (one, other)])
    assert with_earlier_scores(again, earlier) == earlier
    third = replace(scores_of(replace(other.protocol, extractor="inception"), "c", "d"), metrics={"ratio_fid_5": 2.0})
    assert "fdr_5" not in with_earlier_scores(merge_reports([*again.parts, third]), earlier).repeats
    assert "fdr_5" not in with_repeats([again, merge_reports([*again.parts, third])]).repeats


def test_fewer_repeats_cut_no_longer_ones(config, opened):
    one, _ = (scores_of(each, "c", "d") for each in planned(config, opened).protocols)
    seeds = [replace(one, metrics={one.headline: value}) for value in (1.0, 4.0, 2.0)]
    three = with_repeats(seeds)
    assert three.repeats == {one.headline: [1.0, 4.0, 2.0]}
    assert with_repeats([three, seeds[1]]) == three
    assert with_repeats([three, seeds[2]]).repeats == {one.headline: [1.0, 2.0]}
    assert with_repeats([*with_repeats(seeds[:2]).parts, *seeds[1:]]) == three


def test_precision_against_recall_is_the_first_extractors(config, opened):
    one, other = (scores_of(each, "step_2", "d") for each in planned(config, opened).protocols)
    reports = []
    for report, value in ((one, 0.5), (other, 0.25)):
        stem = report.headline.removeprefix("fd_")
        metrics = {**report.metrics, f"precision_{stem}": value, f"recall_{stem}": value / 2}
        reports.append(replace(report, metrics=metrics))
    assert precision_recall(merge_reports(reports)) == precision_recall(reports[0]) == PrecisionRecall(2, 0.5, 0.25)


def test_a_plan_names_every_protocol(config, opened, raydit):
    code, out, err = raydit("evaluate", opened.origin, "--dry-run", "--json")
    assert code == 0, err
    first, second = planned(config, opened).protocols
    (plan,) = json.loads(out.splitlines()[-1])["plans"]
    assert (plan["protocol_id"], plan["further_protocol_ids"]) == (first.protocol_id, [second.protocol_id])
    assert f"also scored by protocol {second.label}" in out


def test_time_is_planned_for_the_features_of_every_extractor(config):
    networks, cluster = resolve_networks(config, 3), parse_cluster("1xA100", price=0.0)
    settings = [replace(each.evaluate, gpus_per_worker=1) for each in (alone(config, FIRST), config)]
    flops = [evaluate_work(each, networks, cluster, 30).flops for each in settings]
    assert flops[1] - flops[0] == 30 * 2 * extractor_macs(SECOND)


def test_a_reference_file_is_of_one_extractor(config, tmp_path):
    with pytest.raises(InvalidInput, match="evaluate.extractors: found 2 extractors, expected one"):
        build_reference(replace(config, output=str(tmp_path / "work")), str(tmp_path / "r.npz"))


def test_recipes_name_several_extractors(config, weights):
    evaluate = config.evaluate
    assert (evaluate.extractor, evaluate.extractors) == (FIRST, (FIRST, SECOND))
    first, second = evaluate.for_each_extractor()
    assert (first.extractor, first.extractors, first.extractor_weights) == (FIRST, (), None)
    assert (second.extractor, second.extractor_weights) == (SECOND, str(weights))
    recorded = json.loads(json.dumps(resolved(config)))
    assert validate_recipe(recorded) == config
    assert "extractors" not in resolved(alone(config, FIRST))["evaluate"]
    assert alone(config, FIRST).evaluate.for_each_extractor() == [alone(config, FIRST).evaluate]


def test_paths_in_a_table_are_refused_for_a_job_on_another_machine():
    config = changed(BOTH, f'evaluate.reference={{"{FIRST}"="r.npz"}}')
    assert relative_recipe_paths(config)[f"evaluate.reference.{FIRST}"] == "r.npz"


def test_workers_get_the_absolute_paths_of_weights(config, weights, monkeypatch):
    monkeypatch.chdir(weights.parent)
    given = {SECOND: weights.name, FIRST: "elsewhere"}
    relative = replace(config, evaluate=replace(config.evaluate, extractor_weights=given))
    assert ScoringSettings.from_recipe(relative).evaluate.extractor_weights == {
        SECOND: str(weights),
        FIRST: "elsewhere",
    }


def changed(*overrides):
    return load_recipe(Path(__file__).parents[2] / "recipes" / "tiny.toml", overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([f'evaluate.extractors=["{SECOND}"]'], "evaluate.extractor: found 'efficientnet-lite0' with extractors"),
        ([BOTH.replace(SECOND, FIRST)], "evaluate.extractors: found .*expected each of them once"),
        ([BOTH, "evaluate.reference=r.npz"], "evaluate.reference: found 'r.npz' with 2 extractors, expected a table"),
        ([BOTH, 'evaluate.extractors=["vgg"]'], "evaluate.extractors: found 'vgg'"),
        ([BOTH, 'evaluate.reference={vgg="r.npz"}'], "evaluate.reference.*vgg"),
        ([BOTH, "evaluate.reference=3"], "evaluate.reference: found 3"),
    ],
)
def test_contradicting_extractors_are_refused_by_name(settings, message):
    with pytest.raises(RecipeError) as error:
        changed(*settings)
    assert re.search(message, str(error.value)), str(error.value)
