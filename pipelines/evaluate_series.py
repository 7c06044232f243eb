"""Evaluations of several checkpoints: in turn, or as a training makes them; with a curve over steps and a champion."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

from cluster import storage
from evaluation.page import render_page
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.checkpoints.stored import checkpoint_location, finished_steps
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.evaluate import (
    EVALUATIONS,
    PAGE_FILE,
    check_scoring,
    earlier_report,
    known_report,
    sample_shards,
    score_checkpoint,
    scored_folder,
    shard_folder,
)
from pipelines.scoring.features import Source, compute_features
from pipelines.scoring.protocols import evaluation_protocol
from pipelines.scoring.references import RealImages
from pipelines.scoring.reports import draw_figures, reports_in, save_report, step_of
from pipelines.scoring.saved_images import Format, KeptImages
from pipelines.stage import StageContext, located
from pipelines.tracking.tracker import RunLog

POLL_SECONDS = 5.0

Target = tuple[LocatedCheckpoint, Recipe]


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
        return scored_folder(self.config, self.protocol, self.opened.name)


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
                report, folder = finish(seeds, context), seeds[0].folder
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
        folder = scored_folder(seeded, protocol, opened.name)
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
        compute_features(contexts[output], "evaluate", shards, (located(images), settings, sources), settings)


def finish(seeds: list[Evaluation], context: StageContext) -> EvaluationReport:
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


def watch(
    folder: str, every: int, recipe_of: Callable[[LocatedCheckpoint], Recipe], *, sleep: Callable = time.sleep
) -> Iterator[Target]:
    """Checkpoints of a training as they appear in `folder`, every n-th and the last, with which it ends.

    The n-th: its step divided by train.checkpoint_every is a multiple of n, so that a watcher that is started again
    chooses the same ones.
    """
    done: set[int] = set()
    say("evaluate", f"watching {folder}; Ctrl-C ends it, the same command goes on")
    while True:
        for step in finished_steps(folder):
            if step in done:
                continue
            done.add(step)
            try:
                opened = open_checkpoint(checkpoint_location(folder, step))
            except FileNotFoundError:
                say("evaluate", f"step {step:,} was removed before it could be scored: the training keeps fewer")
                continue
            train = (opened.config["recipe"] or {}).get("train")
            if train is None:
                raise ValueError(
                    f"{opened.origin} is imported: found no recipe, expected a checkpoint of a training to watch. "
                    "Evaluate it without --watch"
                )
            is_last = opened.step >= train["steps"]
            if is_last or opened.step // train["checkpoint_every"] % every == 0:
                yield opened, recipe_of(opened)
            if is_last:
                return
        sleep(POLL_SECONDS)
