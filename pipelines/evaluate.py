"""The evaluate job: checkpoint -> samples -> features -> metrics, for one checkpoint or for several."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from dit.formats.completion import COMPLETE
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.checkpoints.follow import Target, say_removed
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.latents.class_order import with_recorded_class_order
from pipelines.scoring.checks import check_weights
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol
from pipelines.scoring.protocols.protocol_file import check_given_protocol
from pipelines.scoring.real_images.real_listing import listed_once
from pipelines.scoring.reports.report_series import is_in_series, record_series, series_identity
from pipelines.scoring.samples.precision import check_precision, faster_precisions
from pipelines.scoring.samples.saved_samples import SampleFormat, SavedSamples
from pipelines.scoring.score_checkpoint import (
    CheckpointEvaluation,
    prepare_saved_folders,
    protocol_tags,
    say_finished,
    score_checkpoint,
)
from pipelines.scoring.seeds import SeedEvaluation, compute_together, plan_seeds, score_seeds
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
        check_weights(opened, settings.evaluate, evaluation.protocol)
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
    if options.promote:
        from pipelines.registry.promotion import refuse_name

        refuse_name(options.promote)
    finished: list[FinishedEvaluation] = []
    with ExitStack() as stack:
        outputs = OpenOutputs(stack, address)
        for batch in batches:
            for _, config in batch:
                outputs.open(config)
            with listed_once():
                planned = plan_and_compute(outputs, batch, options, several=series)
                in_series = series or options.repeats > 1
                reports = [score_planned(outputs, each, in_series=in_series) for each in planned]
            # Promoted after all of them have reports, because one may be the champion, and be scored again.
            for each, report in zip(planned, reports, strict=True):
                context = outputs.contexts[each.evaluation.settings.output]
                is_decided = not options.promote or promote(
                    context, report, each.evaluation.opened, experiment=each.config.name, model=options.promote
                )
                finished.append(
                    FinishedEvaluation(report, each.evaluation.folder, context.tracking_uri, not is_decided)
                )
    return finished


class OpenOutputs:
    """The outputs that checkpoints are evaluated in: their contexts, and the MLflow runs over several checkpoints.

    All stay open until `stack` is closed, so that each output is held once, and each run opened once.
    """

    def __init__(self, stack: ExitStack, address: str | None) -> None:
        """address: of Ray."""
        self.contexts: dict[str, StageContext] = {}
        """By path or URI of the output."""
        self._stack, self._address = stack, address
        self._series_runs: dict[str, RunLog] = {}

    def open(self, config: Recipe) -> None:
        """Open the output of a recipe, unless it is open."""
        if (output := storage.absolute(config.output)) not in self.contexts:
            context = StageContext(config, address=self._address, part=EVALUATIONS)
            self.contexts[output] = self._stack.enter_context(context)

    def series_run(self, context: StageContext, folder: str, report: EvaluationReport) -> RunLog:
        """Return the run over all checkpoints with reports in the folder of a protocol, the one of `report`."""
        if folder not in self._series_runs:
            run = context.run(EVALUATIONS, series_identity(report), protocol_tags(report.protocol))
            self._series_runs[folder] = self._stack.enter_context(run)
        return self._series_runs[folder]


class PlannedCheckpoint(NamedTuple):
    """A checkpoint that is evaluated by a recipe, with one or several seeds."""

    config: Recipe
    seeds: list[SeedEvaluation]

    @property
    def evaluation(self) -> CheckpointEvaluation:
        """The evaluation with the first seed, whose report gets the values of all seeds."""
        return self.seeds[0].evaluation


def plan_and_compute(
    outputs: OpenOutputs, batch: Sequence[Target], options: EvaluationOptions, *, several: bool
) -> list[PlannedCheckpoint]:
    """Plan the evaluations of a batch of checkpoints, and compute their records.

    Returns nothing if all of them were removed meanwhile, and options allow it; raises NotFound for the first that was
    removed if they do not.
    """
    try:
        planned = []
        for opened, config in batch:
            saved = saved_samples(options, opened, several=several)
            seeds = plan_seeds(opened, config, repeats=options.repeats, force=options.force, saved=saved)
            planned.append(PlannedCheckpoint(config, seeds))
        seeds_of_all = [seed for each in planned for seed in each.seeds]
        prepare_saved_folders(seed.evaluation for seed in seeds_of_all)
        compute_together(outputs.contexts, seeds_of_all, force=options.force)
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


def score_planned(outputs: OpenOutputs, planned: PlannedCheckpoint, *, in_series: bool) -> EvaluationReport:
    """Score a checkpoint whose records are computed, and return its report.

    in_series: also log the report to the run over all checkpoints by its protocol, unless it is there.
    """
    evaluation, images_per_step = planned.evaluation, planned.config.train.global_batch_size
    context = outputs.contexts[evaluation.settings.output]
    report = score_seeds(context, planned.seeds, images_per_step)
    is_new = any(seed.report is None for seed in planned.seeds)
    if in_series and (is_new or not is_in_series(context, report)):
        folder = storage.split(evaluation.folder)[0]
        record_series(outputs.series_run(context, folder, report), folder, report, images_per_step)
    return report


def is_removed(opened: LocatedCheckpoint) -> bool:
    """Return whether the training of an open checkpoint has removed it, which begins with COMPLETE."""
    if opened.imported is not None or opened.is_registered_copy:
        return False
    return not storage.exists(storage.join(opened.origin, COMPLETE))


def saved_samples(options: EvaluationOptions, opened: LocatedCheckpoint, *, several: bool) -> SavedSamples | None:
    """Return where a checkpoint's samples are to be saved, if they are."""
    if options.save_samples is None:
        return None
    folder = storage.join(options.save_samples, opened.name) if several else options.save_samples
    if storage.is_local(folder):
        folder = storage.local_path(folder)  # workers run in other working directories
    return SavedSamples(folder, options.save_format, opened.record.class_names)


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
