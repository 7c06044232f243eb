"""Evaluate a checkpoint with one or several seeds: plan them, compute their records together, and score each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.scoring.checks import check_scoring_inputs, check_weights
from pipelines.scoring.class_distances import check_class_distances
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.reports.report_files import rewrite_report
from pipelines.scoring.samples.precision import check_precision, faster_precisions
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.scoring.score_checkpoint import (
    CheckpointEvaluation,
    compute_features,
    group_by_settings,
    say_finished,
    score_checkpoint,
)
from pipelines.scoring.score_extractors import averages_alike
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext


@dataclass(frozen=True)
class SeedEvaluation:
    """The evaluation of one checkpoint with one seed, and the report that it already has, if any."""

    evaluation: CheckpointEvaluation
    report: EvaluationReport | None


def plan_seeds(
    opened: LocatedCheckpoint, config: Recipe, *, repeats: int, force: bool, saved: SavedSamples | None
) -> list[SeedEvaluation]:
    """Plan the evaluation of a checkpoint with `repeats` seeds, the recipe's own first.

    force: score again even if there is a report. saved: where to write the first seed's samples as well. Raises
    NotFound or InvalidInput before any work if something is missing or does not fit.
    """
    planned = []
    for seed in range(config.seed, config.seed + repeats):
        settings = replace(ScoringSettings.from_recipe(config), seed=seed)
        protocol = evaluation_protocol(settings, opened)
        check_scoring_inputs(settings, protocol)
        evaluation = CheckpointEvaluation(opened, protocol, settings, saved if seed == config.seed else None)
        again = force or evaluation.lacks_saved_samples()
        report = None if again else evaluation.find_report()
        if report is None:
            check_precision(settings.evaluate, protocol)
            check_class_distances(settings, opened.record.class_names, opened.origin)
            check_weights(opened, settings.evaluate, protocol)
        planned.append(SeedEvaluation(evaluation, report))
    return planned


def compute_together(contexts: Mapping[str, StageContext], planned: Sequence[SeedEvaluation], *, force: bool) -> None:
    """Compute the records of all evaluations without a report, with one pool of workers for equal settings.

    contexts: by output. force: discard the records of interrupted runs.
    """
    unscored = [seed.evaluation for seed in planned if seed.report is None]
    lines: dict[str, None] = {}
    for evaluation in unscored:
        _ = contexts[evaluation.settings.output].tracker  # refuses what can never take reports or runs, before any work
        lines |= dict.fromkeys(faster_precisions(evaluation.settings.evaluate, evaluation.protocol))
    for line in lines:
        say("evaluate", line)
    if force:
        for evaluation in unscored:
            evaluation.remove_shards()
    for group in group_by_settings(unscored):
        settings = group[0].settings
        compute_features(contexts[settings.output], RealImages.of(settings), group)


def score_seeds(context: StageContext, seeds: Sequence[SeedEvaluation], images_per_step: int) -> EvaluationReport:
    """Score a checkpoint with every seed that has no report; return the first seed's report with the values of all."""
    reports = []
    for seed in seeds:
        if seed.report is None:
            reports.append(score_checkpoint(context, seed.evaluation, images_per_step=images_per_step))
        else:
            say_finished(context, seed.evaluation, seed.report, images_per_step)
            reports.append(seed.report)
    report = reports[0] if len(seeds) == 1 else with_repeats(reports)
    if report != reports[0] and context.is_writable:
        rewrite_report(report, seeds[0].evaluation.folder)
    return report


def with_repeats(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """Return the first of several reports that differ in their seed, with the metrics of all as its repeats.

    Where it has more repeats already, which begin with these, it keeps them.
    """
    first = reports[0]
    repeats = dict(first.repeats)
    for name in first.metrics:
        if all(name in report.metrics and averages_alike(first, report, name) for report in reports):
            values = [report.metrics[name] for report in reports]
            if repeats.get(name, [])[: len(values)] != values:
                repeats[name] = values
    return replace(first, repeats=repeats)
