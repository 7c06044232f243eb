"""The evaluate job: checkpoint -> samples -> features -> metrics, of one checkpoint or of several."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from evaluation.page import render_page
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.checkpoints.follow import Target
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.actors import Source, compute_features
from pipelines.scoring.protocols import checkpoint_recipe, evaluation_protocol
from pipelines.scoring.references import RealImages
from pipelines.scoring.report_files import draw_figures, reports_in, save_report, step_of
from pipelines.scoring.saved_samples import Format, KeptImages
from pipelines.scoring.score_checkpoint import (
    EVALUATIONS,
    PAGE_FILE,
    check_scoring,
    earlier_report,
    known_report,
    report_folder_of,
    sample_shards,
    score_checkpoint,
    shard_folder,
)
from pipelines.stage import StageContext
from pipelines.tracking.run_log import RunLog


def evaluate(
    checkpoint: str | Path | LocatedCheckpoint,
    protocol: EvaluationProtocol | None = None,
    *,
    config: Recipe | None = None,
    context: StageContext | None = None,
    force: bool = False,
    kept: KeptImages | None = None,
) -> EvaluationReport:
    """Score a checkpoint, or read the report of an earlier evaluation by the same protocol.

    checkpoint: any name of one, see pipelines.checkpoints.open. protocol: left out, that of `config`'s [evaluate].
    config: left out, the recipe that the checkpoint records. force: do it again. kept: where the samples are written
    as well. Raises FileNotFoundError or ValueError before any work if something does not fit.
    """
    opened = open_checkpoint(checkpoint)
    config = config or checkpoint_recipe(opened)
    if context is None:
        with StageContext(config, part=EVALUATIONS) as own:
            return evaluate(opened, protocol, config=config, context=own, force=force, kept=kept)
    protocol = protocol or evaluation_protocol(config, opened)
    folder = report_folder_of(config, protocol, opened.name)
    with context.holding(EVALUATIONS):
        report = earlier_report(folder, opened.digest)
        if report is not None and not force and kept is None:
            context.skipped("evaluate", f"protocol {protocol.protocol_id}, report in {folder}")
            return report
        if force:
            storage.remove_folder(shard_folder(config, opened, folder))
        return score_checkpoint(config, context, opened, protocol, folder, kept)


class Scored(NamedTuple):
    """A report, and where it is."""

    report: EvaluationReport
    folder: str
    tracking_uri: str


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is done with every checkpoint."""

    repeats: int = 1
    """Seeds: the recipe's, and those after it."""
    force: bool = False
    """Do again what has a report."""
    keep: str | None = None
    """Folder or URI for the samples of the first seed; of several checkpoints each gets a folder in it."""
    keep_format: Format = "parquet"
    promote: str | None = None
    """Registered model whose alias goes to a checkpoint that is better than who has it."""


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint with one seed, and what is there of it."""

    opened: LocatedCheckpoint
    config: Recipe
    protocol: EvaluationProtocol
    kept: KeptImages | None
    report: EvaluationReport | None
    """The one that stands; None: to be made."""

    @property
    def folder(self) -> str:
        return report_folder_of(self.config, self.protocol, self.opened.name)


def evaluate_each(
    batches: Iterable[Sequence[Target]], plan: EvaluationPlan, *, address: str | None = None, series: bool = True
) -> list[Scored]:
    """Evaluate checkpoints as they come, each by its recipe; those of one batch by one pool of workers.

    series: several are meant, even if only one comes. Then, after each, the curve over all reports of its protocol is
    drawn anew, and the numbers of all go to one MLflow run.
    """
    found: list[Scored] = []
    with ExitStack() as stack:
        contexts: dict[str, StageContext] = {}
        runs: dict[str, RunLog] = {}
        for batch in batches:
            for _, config in batch:
                if config.output not in contexts:
                    context = StageContext(config, address=address, part=EVALUATIONS)
                    contexts[config.output] = stack.enter_context(context)
            evaluations = [evaluations_of(opened, config, plan, several=series) for opened, config in batch]
            compute_together([each for seeds in evaluations for each in seeds], plan, contexts)
            for seeds in evaluations:
                config, context = seeds[0].config, contexts[seeds[0].config.output]
                report, folder = finish_report(seeds, context), seeds[0].folder
                found.append(Scored(report, folder, context.tracker.uri))
                if (series or plan.repeats > 1) and any(each.report is None for each in seeds):
                    reports = storage.split(folder)[0]
                    if reports not in runs:
                        identity = {"protocol": report.protocol_id}
                        runs[reports] = stack.enter_context(context.run("evaluations", identity))
                    record_series(runs[reports], reports, report, config.train.global_batch_size)
                if plan.promote:
                    context.say("promote", promote(report, config, plan.promote, context)[0])
    return found


def evaluations_of(
    opened: LocatedCheckpoint, config: Recipe, plan: EvaluationPlan, *, several: bool
) -> list[Evaluation]:
    """One for each seed. Raises ValueError before any work if something does not fit."""
    evaluations = []
    for seed in range(config.seed, config.seed + plan.repeats):
        seeded = replace(config, seed=seed)
        protocol = evaluation_protocol(seeded, opened)
        check_scoring(seeded, protocol)
        kept = kept_images(plan, opened, several) if seed == config.seed else None
        again = plan.force or kept is not None
        folder = report_folder_of(seeded, protocol, opened.name)
        report = None if again else known_report(folder, opened.digest)
        evaluations.append(Evaluation(opened, seeded, protocol, kept, report))
    return evaluations


def compute_together(evaluations: list[Evaluation], plan: EvaluationPlan, contexts: dict[str, StageContext]) -> None:
    """Records of all shards of what is to be made, by one pool of workers for each kind of them."""
    groups: dict[tuple, list[Evaluation]] = {}
    for each in evaluations:
        if each.report is None:
            groups.setdefault((each.config.output, each.config.images, each.config.evaluate), []).append(each)
    for (output, images, settings), group in groups.items():
        shards = RealImages.of(group[0].config).missing_shards()
        for source, each in enumerate(group):
            drawn = sample_shards(each.config, each.opened, each.protocol, each.folder, each.kept)
            if plan.force:
                storage.remove_folder(shard_folder(each.config, each.opened, each.folder))
            shards += [replace(shard, source=source) for shard in drawn]
        sources = [Source(each.opened.shared, each.protocol, each.kept) for each in group]
        compute_features(
            contexts[output], "evaluate", shards, (with_absolute_paths(images), settings, sources), settings
        )


def finish_report(seeds: list[Evaluation], context: StageContext) -> EvaluationReport:
    """The report of the first seed, with the numbers of the others in it."""
    reports = []
    for each in seeds:
        if each.report is not None:
            context.skipped("evaluate", f"protocol {each.protocol.protocol_id}, report in {each.folder}")
            reports.append(each.report)
            continue
        earlier_report(each.folder, each.opened.digest)  # another checkpoint's, which must not be written over
        reports.append(score_checkpoint(each.config, context, each.opened, each.protocol, each.folder, each.kept))
    first = reports[0] if len(seeds) == 1 else with_repeats(reports)
    if first != reports[0]:
        rewrite(first, seeds[0].folder)
    return first


def kept_images(plan: EvaluationPlan, opened: LocatedCheckpoint, several: bool) -> KeptImages | None:
    if plan.keep is None:
        return None
    folder = storage.join(plan.keep, opened.name) if several else plan.keep
    if storage.is_local(folder):
        folder = storage.local_path(folder)  # workers run in other working directories
    return KeptImages(folder, plan.keep_format, tuple(opened.config["class_names"]))


def with_repeats(reports: list[EvaluationReport]) -> EvaluationReport:
    """The first of several reports that differ in their seed, with the values of all."""
    first = reports[0]
    return replace(first, repeats={name: [report.metrics[name] for report in reports] for name in first.metrics})


def rewrite(report: EvaluationReport, folder: str) -> None:
    """Save a report that was there already with what has been learned since, and its page."""
    files = {name: file for name, file in report.artifacts.items() if file.endswith(".png")}
    pictures = {name: storage.read_bytes(storage.join(folder, file)) for name, file in files.items()}
    storage.write_atomically(storage.join(folder, PAGE_FILE), render_page(report, pictures).encode())
    save_report(report, folder)


def record_series(run: RunLog, folder: str, report: EvaluationReport, images_per_step: int) -> None:
    """The report's numbers at its step in a run of all of them, and the curve drawn anew."""
    step = step_of(report)
    if step is None:
        return
    run.metrics({f"eval/{name}": report.estimate(name)[0] for name in report.metrics}, step)
    reports = reports_in(folder)
    figures = draw_figures(reports, folder, images_per_step)
    for figure in figures:
        run.artifact(figure)
    if figures:
        say("evaluate", f"curve over {len(reports)} checkpoints: {figures[0]}")


def promote(report: EvaluationReport, config: Recipe, name: str, context: StageContext) -> tuple[str, bool]:
    """Make a report's checkpoint the champion of a registered model, if it is better."""
    from pipelines.registry.promotion import promote_report

    context.tracker.flush()
    return promote_report(context.tracker.uri, config.name, name, report)
