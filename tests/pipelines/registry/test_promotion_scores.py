"""A checkpoint with an alias that is scored again keeps the alias, which then stands for its present score."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_story import tell_evaluation, tell_story

from pipelines import evaluate
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry import promotion
from pipelines.scoring.reports.report_files import rewrite_report
from pipelines.scoring.score_checkpoint import CheckpointEvaluation
from pipelines.scoring.seeds import SeedEvaluation
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext
from raydit.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("store")
REPEATS = [20.0, 20.2, 20.4]
"""Mean 20.2; standard error 0.2 / sqrt(3) = 0.11547."""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One of its own, because these tests write reports into it."""
    return tell_story(tmp_path_factory.mktemp("story"))


@pytest.fixture
def scored(story, request):
    """scored(step, *values): the report of a checkpoint by a protocol of this test, with a value for each seed.

    It replaces an earlier one on storage. One value by itself has no error.
    """
    seed = 1000 + sum(request.node.name.encode())
    config = replace(story.config, seed=seed)

    def score(step, *values):
        with StageContext(config) as context:
            report = tell_evaluation(context, config, story.checkpoints[step], values[0])
        repeats = {report.headline: list(values)} if len(values) > 1 else {}
        report = replace(report, errors={}, repeats=repeats)
        opened = open_checkpoint(story.checkpoints[step].path)
        evaluation = CheckpointEvaluation(opened, report.protocol, ScoringSettings.from_recipe(config))
        rewrite_report(report, evaluation.folder)
        return report

    return score


@pytest.fixture
def promote(story):
    def call(report, name, **options):
        return promotion.promote_report(story.uri, story.config.name, name, report, **options)

    return call


@pytest.fixture
def recorded(store):
    """recorded(name, alias): the number of the version that has an alias, its step, value and error."""

    def read(name, alias="champion"):
        version = store.get_model_version_by_alias(name, alias)
        found = version.tags
        return int(version.version), found["raydit.step"], float(found["raydit.value"]), float(found["raydit.error"])

    return read


@pytest.mark.parametrize("alias", ["champion", "challenger"])
def test_a_holder_that_is_promoted_again_stands_for_its_new_score(story, scored, promote, recorded, store, alias):
    name = f"again-{alias}"
    assert promote(scored(2, 30.0), name, alias=alias).given
    report = scored(2, *REPEATS)
    assert promote(report, name, alias=alias) == (
        f"models:/{name}@{alias} is now version 2, the same checkpoint, scored again: 20.2 +- 0.115, before 30",
        True,
    )
    assert recorded(name, alias) == (2, "2", pytest.approx(20.2), pytest.approx(0.11547, rel=1e-4))
    version = store.get_model_version_by_alias(name, alias)
    assert f"Step 2: {report.headline} 20.2 ± 0.115 by protocol `{report.protocol_id}`" in version.description
    first = store.get_model_version(name, "1")
    assert first.source == version.source and float(first.tags["raydit.value"]) == 30.0
    assert {**version.tags, "raydit.value": 0, "raydit.error": 0, f"raydit.before.{alias}": 0} == {
        **first.tags,
        "raydit.value": 0,
        "raydit.error": 0,
        f"raydit.before.{alias}": 0,
    }
    assert promote(report, name, alias=alias) == (f"models:/{name}@{alias} is already this checkpoint", False)
    # With both errors known, a better one can win.
    assert promote(scored(4, 19.0, 19.0), name, alias=alias).given and recorded(name, alias) == (3, "4", 19.0, 0.0)


def test_a_candidate_is_compared_with_the_holders_present_score(scored, promote, recorded):
    """The champion was scored with more seeds after its promotion, and not promoted again."""
    assert promote(scored(4, 19.0), "present").given
    scored(4, *REPEATS)
    found = promote(scored(6, 20.3, 20.3), "present")
    assert found == (
        "models:/present@champion is now version 2, the same checkpoint, scored again: 20.2 +- 0.115, before 19; "
        "models:/present@champion stays: 20.2 against 20.3, not better by more than the error of 0.12",
        False,
    )
    assert recorded("present") == (2, "4", pytest.approx(20.2), pytest.approx(0.11547, rel=1e-4))


def test_a_holder_that_scored_again_still_yields_to_a_better_score_only(scored, promote, recorded, story):
    assert promote(scored(2, 30.0, 30.0), "rule").given
    assert promote(scored(4, 20.0, 20.0), "rule").given
    scored(4, *REPEATS)
    close = promote(scored(6, 20.1, 20.1), "rule")
    assert not close.given and recorded("rule")[:2] == (3, "4")
    assert "models:/rule@champion stays: 20.2 against 20.1" in close.explanation
    assert "models:/rule@challenger is now version 4" in close.explanation
    assert recorded("rule", "challenger")[:2] == (4, "6")
    better = promote(scored(6, 19.0, 19.0), "rule")
    assert better.given and recorded("rule") == (5, "6", 19.0, 0.0)
    assert better.explanation.startswith("models:/rule@champion is now version 5: 19, before 20.2")
    # To another checkpoint each time, whatever the number of scores.
    assert "is version 3 again, instead of 5" in promotion.rollback(story.uri, "rule")
    assert "is version 1 again, instead of 3" in promotion.rollback(story.uri, "rule")
    with pytest.raises(InvalidInput, match="found no version that held the alias before it"):
        promotion.rollback(story.uri, "rule")


def test_a_challenger_that_scored_again_and_is_not_better_stands_for_its_new_score(scored, promote, recorded):
    assert promote(scored(2, 20.0, 20.0), "second").given
    assert promote(scored(4, *REPEATS), "second", alias="challenger").given
    report = scored(4, 21.0, 22.0, 23.0)
    found = promote(report, "second")
    renewed = "models:/second@challenger is now version 3, the same checkpoint, scored again: 22 +- 0.577, before 20.2"
    assert not found.given and renewed in found.explanation
    assert "models:/second@champion stays: 20 against 22" in found.explanation
    assert recorded("second", "challenger") == (3, "4", 22.0, pytest.approx(0.57735, rel=1e-4))
    assert recorded("second")[:2] == (1, "2")


def test_a_holder_whose_report_is_gone_keeps_its_recorded_score(scored, promote, recorded, story, monkeypatch):
    def lose(*arguments, **options):
        raise FileNotFoundError("report.json")

    assert promote(scored(4, *REPEATS), "gone").given
    monkeypatch.setattr("pipelines.registry.promotion_score.find_reports", lose)
    assert "stays: 20.2 against 30" in promote(scored(2, 30.0, 30.0), "gone").explanation
    assert recorded("gone")[:2] == (1, "4")


def test_checkpoints_are_promoted_after_all_of_them_have_reports(story, monkeypatch):
    """One may be the champion, whose new score the others are compared with."""
    order = []
    batch = [(open_checkpoint(story.checkpoints[step].path), story.config) for step in (2, 4)]

    def plan(outputs, batch, options, several):
        settings = ScoringSettings.from_recipe(story.config)
        evaluations = [SimpleNamespace(opened=opened, folder="", settings=settings) for opened, _ in batch]
        seeds = [SeedEvaluation(each, story.reports[each.opened.step]) for each in evaluations]
        return [evaluate.PlannedCheckpoint(story.config, [each]) for each in seeds]

    def finish(context, seeds, images_per_step):
        order.append(("report", seeds[0].report.checkpoint_digest))
        return seeds[0].report

    def decide(context, report, opened, **options):
        order.append(("promote", report.checkpoint_digest))
        return opened.step == 2

    context = SimpleNamespace(tracking_uri=story.uri)
    monkeypatch.setattr(evaluate, "StageContext", lambda *arguments, **options: nullcontext(context))
    for name, replacement in (("plan_and_compute", plan), ("score_seeds", finish), ("promote", decide)):
        monkeypatch.setattr(evaluate, name, replacement)
    finished = evaluate.evaluate_each([batch], evaluate.EvaluationOptions(promote="m"), series=False)
    digests = [story.checkpoints[step].digest for step in (2, 4)]
    assert order == [(kind, digest) for kind in ("report", "promote") for digest in digests]
    assert [(each.report.checkpoint_digest, each.is_promotion_due) for each in finished] == [
        (digests[0], False),
        (digests[1], True),
    ]
