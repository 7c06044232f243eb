"""Evaluations of several checkpoints: in turn, or as a training makes them; with a curve over steps and a champion."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from dit.checkpoint import COMPLETE
from evaluation.page import render_page
from evaluation.report import EvaluationReport
from pipelines.config import Recipe
from pipelines.evaluate import EVALUATIONS, PAGE_FILE, evaluate, known_report, protocol_folder
from pipelines.keep import Format, KeptImages
from pipelines.locate import LocatedCheckpoint, open_checkpoint, storage_name
from pipelines.progress import say
from pipelines.protocols import evaluation_protocol
from pipelines.reports import reports_in, save_curve, step_of
from pipelines.stage import StageContext
from pipelines.tracking import RunLog

POLL_SECONDS = 5.0

Target = tuple[LocatedCheckpoint, Recipe]


class Scored(NamedTuple):
    """A report, and where it is."""

    report: EvaluationReport
    folder: Path
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


def evaluate_each(
    targets: Iterable[Target], plan: EvaluationPlan, *, address: str | None = None, series: bool = True
) -> list[Scored]:
    """Evaluate checkpoints as they come, each by its recipe. series: several are meant, even if only one comes.

    After each, the curve over all reports of its protocol is drawn anew; the numbers of all go to one MLflow run.
    """
    found: list[Scored] = []
    with ExitStack() as stack:
        contexts: dict[str, StageContext] = {}
        runs: dict[Path, RunLog] = {}
        for opened, config in targets:
            if config.output not in contexts:
                contexts[config.output] = stack.enter_context(StageContext(config, address=address, part=EVALUATIONS))
            context = contexts[config.output]
            report, new = evaluate_repeatedly(opened, config, plan, context, several=series)
            folder = protocol_folder(config, report.protocol)
            found.append(Scored(report, folder / opened.name, context.tracker.uri))
            if series and new:
                if folder not in runs:
                    runs[folder] = stack.enter_context(context.run("evaluations", {"protocol": report.protocol_id}))
                record_series(runs[folder], folder, report)
            if plan.promote:
                context.say("promote", promote(report, config, plan.promote, context)[0])
    return found


def evaluate_repeatedly(
    opened: LocatedCheckpoint, config: Recipe, plan: EvaluationPlan, context: StageContext, *, several: bool = False
) -> tuple[EvaluationReport, bool]:
    """The report of the recipe's seed, which holds the numbers of the others; and whether anything was done."""
    reports, new = [], False
    for seed in range(config.seed, config.seed + plan.repeats):
        seeded = replace(config, seed=seed)
        folder = protocol_folder(seeded, evaluation_protocol(seeded, opened)) / opened.name
        kept = kept_images(plan, opened, several) if seed == config.seed else None
        new |= plan.force or kept is not None or known_report(folder, opened.digest) is None
        reports.append(evaluate(opened, config=seeded, context=context, force=plan.force, kept=kept))
    first = reports[0]
    if plan.repeats > 1:
        first = with_repeats(reports)
        if first != reports[0]:
            rewrite(first, protocol_folder(config, first.protocol) / opened.name)
    return first, new


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


def rewrite(report: EvaluationReport, folder: Path) -> None:
    """Save a report that was there already with what has been learned since, and its page."""
    pictures = {name: folder / file for name, file in report.artifacts.items() if file.endswith(".png")}
    page = render_page(report, {name: file.read_bytes() for name, file in pictures.items()})
    storage.write_atomically(str(folder / PAGE_FILE), page.encode())
    report.save(folder)


def record_series(run: RunLog, folder: Path, report: EvaluationReport) -> None:
    """The report's numbers at its step in a run of all of them, and the curve drawn anew."""
    step = step_of(report)
    if step is None:
        return
    run.metrics({f"eval/{name}": report.estimate(name)[0] for name in report.metrics}, step)
    if curve := save_curve(folder):
        run.artifact(curve)
        say("evaluate", f"curve over {len(reports_in(folder))} checkpoints: {curve}")


def promote(report: EvaluationReport, config: Recipe, name: str, context: StageContext) -> tuple[str, bool]:
    """Make a report's checkpoint the champion of a registered model, if it is better; see registry.promote."""
    from pipelines.registry import Standing
    from pipelines.registry import promote as promote_model

    value, error = report.estimate(report.headline)
    margin = math.inf if error is None else error
    candidate = Standing(report.checkpoint_digest, report.protocol_id, report.headline, value, margin)
    context.tracker.flush()
    return promote_model(context.tracker.uri, config.name, name, candidate)


def watch(
    folder: str, every: int, recipe_of: Callable[[LocatedCheckpoint], Recipe], *, sleep: Callable = time.sleep
) -> Iterator[Target]:
    """Checkpoints of a training as they appear in `folder`, every n-th and the last, with which it ends.

    The n-th: its step divided by train.checkpoint_every is a multiple of n, so that a watcher that is started again
    chooses the same ones.
    """
    done: set[str] = set()
    say("evaluate", f"watching {folder}; Ctrl-C ends it, the same command goes on")
    while True:
        for name in complete_checkpoints(folder):
            if name in done:
                continue
            done.add(name)
            opened = open_checkpoint(storage.join(folder, name))
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


def complete_checkpoints(folder: str) -> list[str]:
    """Names of the finished checkpoints in a folder or at a URI, by step; none where there is no folder yet."""
    if not storage.exists(folder):
        return []
    names = [name for name in storage.list_names(folder) if storage_name(name).startswith("step_")]
    return [name for name in names if storage.exists(storage.join(folder, name, COMPLETE))]
