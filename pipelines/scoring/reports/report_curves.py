"""Figures over all reports of one protocol: the score against the training step, precision against recall."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster import storage
from evaluation.metric_names import parse_metric_name
from evaluation.plots.over_steps import StepValue, plot_metric_over_steps
from evaluation.plots.precision_recall import PrecisionRecall, plot_precision_recall
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import is_superseded
from pipelines.images.grids import save_png
from pipelines.scoring.reports.report_files import find_report_files, read_reports

if TYPE_CHECKING:
    from PIL import Image

CURVE_FILE = "curve.png"
TRADEOFF_FILE = "precision_recall.png"


def step_of(report: EvaluationReport) -> int | None:
    """Return the training step, which the checkpoint's name holds; None for a checkpoint of another name."""
    match = re.search(r"step_(\d+)/?$", report.checkpoint.partition("?")[0])
    return int(match[1]) if match else None


def load_reports_by_step(folder: str) -> list[EvaluationReport]:
    """Load all reports in a protocol's folder whose training step is known, sorted by step.

    Those of a superseded training, whose steps the present one has not reached or was not scored at, are left out.
    """
    steps = [(step_of(report), report) for report in read_reports(find_report_files(folder, None))]
    known = [(step, report) for step, report in steps if step is not None]
    ordered = [report for _, report in sorted(known, key=lambda pair: pair[0])]
    return [report for report in ordered if not is_superseded(report.checkpoint, report.checkpoint_digest)]


def save_curves(reports: Sequence[EvaluationReport], folder: str, images_per_step: int = 0) -> list[str]:
    """Draw the curves over a protocol's reports into its folder; return the paths or URIs of the files.

    reports: by step, as load_reports_by_step gives them; fewer than two make no curve. images_per_step: the
    training's global batch size; 0: unknown.
    """
    if len(reports) < 2:
        return []
    files = [save_png(draw_score_curve(reports, images_per_step), storage.join(folder, CURVE_FILE))]
    if points := [point for report in reports if (point := _precision_recall(report)) is not None]:
        files.append(save_png(plot_precision_recall(_title(reports), points), storage.join(folder, TRADEOFF_FILE)))
    return files


def draw_score_curve(reports: Sequence[EvaluationReport], images_per_step: int = 0) -> "Image.Image":
    """Draw the headline metric of the last report against the training step, for all reports that have it."""
    metric = reports[-1].headline
    points = []
    for report in reports:
        if metric in report.metrics:
            value, error = report.estimate(metric)
            points.append(StepValue(step_of(report) or 0, value, error or 0.0))
    kind = parse_metric_name(metric).kind
    return plot_metric_over_steps(
        f"{metric}, {_title(reports)}",
        points,
        label=f"{kind.label} {kind.arrow}",
        real_baseline=reports[-1].real_baseline.get(metric),
        images_per_step=images_per_step,
    )


def _precision_recall(report: EvaluationReport) -> PrecisionRecall | None:
    """Return precision and recall of all of the (first) protocol's samples; None if they were not measured."""
    report = report.parts[0]
    parsed = {name: parse_metric_name(name) for name in report.metrics}
    named = {(parts.kind.name, parts.num_samples): name for name, parts in parsed.items()}
    names = [named.get((kind, report.protocol.num_samples)) for kind in ("precision", "recall")]
    if None in names:
        return None
    precision, recall = (report.estimate(name)[0] for name in names if name)
    return PrecisionRecall(step_of(report) or 0, precision, recall)


def _title(reports: Sequence[EvaluationReport]) -> str:
    """Return what the protocol says, without the extractor, which the metric's name says."""
    return reports[-1].protocol.summary.rpartition(", ")[0]
