"""The evaluate job: checkpoint -> samples -> features -> metrics, for one checkpoint or for several."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from dit.formats.completion import COMPLETE
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.checkpoints.follow import Target, say_removed
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.latents.class_order import with_recorded_class_order
from pipelines.scoring.checks import check_scoring_inputs
from pipelines.scoring.class_distances import check_class_distances
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol
from pipelines.scoring.protocols.protocol_file import check_given_protocol
from pipelines.scoring.real_images.real_listing import listed_once
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.reports.report_files import rewrite_report, take_back_report
from pipelines.scoring.reports.report_series import in_series, record_series, series_identity
from pipelines.scoring.samples.precision import check_precision, faster_precisions
from pipelines.scoring.samples.saved_samples import SampleFormat, SavedSamples
from pipelines.scoring.score_checkpoint import (
    CheckpointEvaluation,
    compute_features,
    deliver_report,
    group_by_settings,
    prepare_saved_folders,
    protocol_tags,
    score_checkpoint,
)
from pipelines.scoring.score_extractors import averages_alike
from pipelines.scoring.settings import EVALUATIONS, ScoringSettings
from pipelines.stage import StageContext
from pipelines.tracking.run_log import RunLog
from raydit.errors import NotFound, RayditError, Unreachable


@listed_once()
def evaluate(
    checkpoint: str | Path | LocatedCheckpoint,
    protocol: EvaluationProtocol | None = None,
    *,
    config: Recipe | None = None,
    context: StageContext | None = None,
    force: bool = False,
    saved: SavedSamples | None = None,
) -> EvaluationReport:
    """Score a checkpoint, or return the report of an earlier evaluation by the same protocol.

    checkpoint: any name of one, see pipelines.checkpoints.open. config: None for the recipe that the checkpoint
    records. protocol: None for that of the recipe's [evaluate]. force: score again even if there is a report.
    saved: where to write the samples as well. Raises NotFound or InvalidInput before any work if something is missing
    or does not fit, AlreadyExists if the folder for the samples has other content.
    """
    opened = open_checkpoint(checkpoint, tracking_uri=config.tracking.uri if config else "")
    config = with_recorded_class_order(config, opened.record.recipe) if config else checkpoint_recipe(opened)
    if context is None:
        with StageContext(config, part=EVALUATIONS) as own:
            return evaluate(opened, protocol, config=config, context=own, force=force, saved=saved)
    settings, images_per_step = ScoringSettings.from_recipe(config), config.train.global_batch_size
    evaluation = CheckpointEvaluation(opened, protocol or evaluation_protocol(settings, opened), settings, saved)
    with context.holding(EVALUATIONS):
        report = evaluation.find_report()
        if report is not None and not force and not evaluation.lacks_saved_samples():
            say_finished(context, evaluation, report, images_per_step)
            return report
        context.require_writable()
        if protocol is not None:
            check_given_protocol(protocol, settings, opened)
        check_precision(settings.evaluate, evaluation.protocol)
        prepare_saved_folders([evaluation])
        for line in faster_precisions(settings.evaluate, evaluation.protocol):
            context.say("evaluate", line)
        if force:
            evaluation.remove_shards()
        return score_checkpoint(context, evaluation, images_per_step=images_per_step)


@listed_once()
def find_report(opened: LocatedCheckpoint, config: Recipe) -> EvaluationReport | None:
    """Return the report of a checkpoint by a recipe's protocols; None if it has not been scored by each of them yet."""
    settings = ScoringSettings.from_recipe(config)
    return CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings).find_report()


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to do with every checkpoint of evaluate_each."""

    repeats: int = 1
    """Number of seeds: the recipe's, and those that follow it."""
    force: bool = False
    """Score again even if there is a report."""
    save_samples: str | None = None
    """Folder or URI for the samples of the first seed; several checkpoints get a folder each in it."""
    save_format: SampleFormat = "parquet"
    skip_removed: bool = False
    """Go on if a training has removed a checkpoint before its samples were drawn."""
    promote: str | None = None
    """Registered model whose champion alias moves to a checkpoint that is better than the present champion."""


class FinishedEvaluation(NamedTuple):
    """A report, its folder, and the MLflow store that knows it."""

    report: EvaluationReport
    folder: str
    tracking_uri: str
    is_promotion_due: bool
    """Whether the checkpoint was to be promoted, and MLflow did not answer."""


@dataclass(frozen=True)
class SeedEvaluation:
    """The evaluation of one checkpoint with one seed, and the report that it already has, if any."""

    evaluation: CheckpointEvaluation
    report: EvaluationReport | None


def evaluate_each(
    batches: Iterable[Sequence[Target]],
    options: EvaluationOptions,
    *,
    address: str | None = None,
    series: bool = True,
) -> list[FinishedEvaluation]:
    """Evaluate checkpoints as they come, each by its own recipe; one pool of workers computes a batch.

    series: whether several checkpoints are expected, even if only one comes. Then, after each, the curve over all
    reports of its protocol is drawn again, and the numbers of all go to one MLflow run. address: of Ray.
    """
    finished: list[FinishedEvaluation] = []
    if options.promote:
        from pipelines.registry.promotion import refuse_name

        refuse_name(options.promote)
    with ExitStack() as stack:
        contexts: dict[str, StageContext] = {}
        runs: dict[str, RunLog] = {}
        for batch in batches:
            for _, config in batch:
                if (output := storage.absolute(config.output)) not in contexts:
                    context = StageContext(config, address=address, part=EVALUATIONS)
                    contexts[output] = stack.enter_context(context)
            with listed_once():
                computed = compute_batch(contexts, batch, options, several=series)
                reports = []
                for (_, config), seeds in zip(batch, computed, strict=False):
                    evaluation, images_per_step = seeds[0].evaluation, config.train.global_batch_size
                    context, folder = contexts[evaluation.settings.output], storage.split(evaluation.folder)[0]
                    report = finish_report(context, seeds, images_per_step)
                    reports.append(report)
                    is_new = any(seed.report is None for seed in seeds)
                    is_due = (series or options.repeats > 1) and (is_new or not in_series(context, report))
                    if is_due and folder not in runs:
                        run = context.run(EVALUATIONS, series_identity(report), protocol_tags(report.protocol))
                        runs[folder] = stack.enter_context(run)
                    if is_due:
                        record_series(runs[folder], folder, report, images_per_step)
            # Promoted after all of them have reports, because one may be the champion, and be scored again.
            for report, (_, config), seeds in zip(reports, batch, computed, strict=False):
                evaluation = seeds[0].evaluation
                context = contexts[evaluation.settings.output]
                is_decided = not options.promote or promote(
                    context, report, evaluation.opened, experiment=config.name, model=options.promote
                )
                finished.append(FinishedEvaluation(report, evaluation.folder, context.tracking_uri, not is_decided))
    return finished


def compute_batch(
    contexts: dict[str, StageContext], batch: Sequence[Target], options: EvaluationOptions, *, several: bool
) -> list[list[SeedEvaluation]]:
    """Compute the records of a batch of checkpoints, and return each one's evaluations.

    contexts: by output. Returns nothing if all of them were removed meanwhile, and options allow it; raises NotFound
    for the first that was removed if they do not.
    """
    try:
        planned = [plan_seeds(opened, config, options, several=several) for opened, config in batch]
        prepare_saved_folders(seed.evaluation for seeds in planned for seed in seeds)
        compute_together(contexts, [seed for seeds in planned for seed in seeds], force=options.force)
        return planned
    except (RayditError, OSError) as error:
        removed = [opened for opened, _ in batch if is_removed(opened)]
        if removed and not options.skip_removed:
            raise NotFound(
                f"{removed[0].origin} was removed while it was evaluated, or waited for workers",
                "a checkpoint that stays: a training with train.keep_last removes older ones",
                "evaluate a newer one, or a copy of it elsewhere",
            ) from error
        if len(removed) < len(batch):
            raise
        for opened in removed:
            say_removed(opened.step)
        return []


def is_removed(opened: LocatedCheckpoint) -> bool:
    """Return whether the training of an open checkpoint has removed it, which begins with COMPLETE."""
    if opened.imported is not None or opened.is_registered_copy:
        return False
    return not storage.exists(storage.join(opened.origin, COMPLETE))


def plan_seeds(
    opened: LocatedCheckpoint, config: Recipe, options: EvaluationOptions, *, several: bool
) -> list[SeedEvaluation]:
    """Plan the evaluation of a checkpoint with each seed, the recipe's own first.

    Raises NotFound or InvalidInput before any work if something is missing or does not fit.
    """
    planned = []
    for seed in range(config.seed, config.seed + options.repeats):
        settings = replace(ScoringSettings.from_recipe(config), seed=seed)
        protocol = evaluation_protocol(settings, opened)
        check_scoring_inputs(settings, protocol)
        saved = saved_samples(options, opened, several=several) if seed == config.seed else None
        evaluation = CheckpointEvaluation(opened, protocol, settings, saved)
        again = options.force or evaluation.lacks_saved_samples()
        report = None if again else evaluation.find_report()
        if report is None:
            check_precision(settings.evaluate, protocol)
            check_class_distances(settings, opened.record.class_names, opened.origin)
        planned.append(SeedEvaluation(evaluation, report))
    return planned


def saved_samples(options: EvaluationOptions, opened: LocatedCheckpoint, *, several: bool) -> SavedSamples | None:
    """Return where a checkpoint's samples are to be saved, if they are."""
    if options.save_samples is None:
        return None
    folder = storage.join(options.save_samples, opened.name) if several else options.save_samples
    if storage.is_local(folder):
        folder = storage.local_path(folder)  # workers run in other working directories
    return SavedSamples(folder, options.save_format, opened.record.class_names)


def compute_together(contexts: dict[str, StageContext], planned: Sequence[SeedEvaluation], *, force: bool) -> None:
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


def finish_report(context: StageContext, seeds: Sequence[SeedEvaluation], images_per_step: int) -> EvaluationReport:
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


def say_finished(
    context: StageContext, evaluation: CheckpointEvaluation, report: EvaluationReport, images_per_step: int
) -> None:
    """Say that an evaluation is finished, after doing what an interrupted one has left if the output is writable."""
    if context.is_writable:
        take_back_report(evaluation.folder, evaluation.opened.digest)
        deliver_report(context, evaluation, report, images_per_step=images_per_step)
    context.skipped("evaluate", f"protocol {evaluation.protocol.label}, report in {evaluation.folder}")


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


def promote(
    context: StageContext, report: EvaluationReport, opened: LocatedCheckpoint, *, experiment: str, model: str
) -> bool:
    """Make a report's checkpoint the champion of a registered model if it is better, and print what was decided.

    Return False if MLflow does not answer, which does not keep other checkpoints from being scored.
    """
    from pipelines.registry.promotion import promote_report

    try:
        if context.is_writable:
            context.tracker.flush()
        text, _ = promote_report(context.tracking_uri, experiment, model, report, opened=opened)
    except Unreachable as error:
        again = "The same command, repeated without --force, promotes it"
        context.say("promote", f"{opened.name} is not promoted: {error}. {again}")
        return False
    context.say("promote", text)
    return True
