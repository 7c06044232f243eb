"""Reports that are there already: found by a checkpoint, a folder or a file, and drawn as a curve over steps."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster import storage
from cluster.read_ahead import opened_in_order
from evaluation.protocol import parse_metric_name
from evaluation.report import REPORT_FILE, EvaluationReport
from evaluation.step_plot import StepValue, step_plot
from evaluation.tradeoff_plot import Tradeoff, tradeoff_plot
from pipelines.checkpoints.open import IN_TRACKING, open_checkpoint
from pipelines.images.grids import save_png

CURVE_FILE = "curve.png"
TRADEOFF_FILE = "precision_recall.png"


def save_report(report: EvaluationReport, folder: str) -> None:
    """Write report.json into a folder, whole or not at all."""
    storage.write_atomically(storage.join(folder, REPORT_FILE), report.to_json().encode())


def load_report(folder: str) -> EvaluationReport | None:
    """The report in a folder, if one is there."""
    place = storage.join(folder, REPORT_FILE)
    return read_report(place) if storage.exists(place) else None


def read_report(file: str) -> EvaluationReport:
    return EvaluationReport.from_json(storage.read_bytes(file).decode())


def report_files(folder: str, *below: str | None) -> list[str]:
    """Paths or URIs of the reports in a folder's folders, in order; below: names of those on the way, None for any."""
    pattern = "/".join(re.escape(name) if name else "[^/]+" for name in (*below, REPORT_FILE))
    names = storage.list_files(folder, recursive=True)
    return [storage.join(folder, name) for name in names if re.fullmatch(pattern, name)]


def find_reports(names: Sequence[str], *, protocol_id: str | None = None) -> list[EvaluationReport]:
    """A report for each name: of its file or folder, or of a checkpoint by any of its names.

    Where checkpoints have several, those of the one protocol that all names have are taken; protocol_id says another.
    Raises FileNotFoundError and ValueError.
    """
    found = [reports_of(name, protocol_id) for name in names]
    if all(len(reports) == 1 for reports in found):
        return [reports[0] for reports in found]
    ids = [{report.protocol_id for report in reports} for reports in found]
    common = set.intersection(*ids)
    if len(common) != 1:
        several = next(index for index, reports in enumerate(found) if len(reports) > 1)
        raise ValueError(
            f"{names[several]} has reports of several protocols: found {', '.join(sorted(ids[several]))}, expected one "
            "that all have, and only one. Choose by --protocol ID"
        )
    return [next(report for report in reports if report.protocol_id in common) for reports in found]


def reports_of(name: str, protocol_id: str | None = None) -> list[EvaluationReport]:
    """All reports that a name may mean, but for those of further seeds, whose numbers another one holds."""
    if not name.startswith(IN_TRACKING):
        if name.partition("?")[0].endswith(".json") and storage.exists(name):
            return [read_report(name)]
        if (report := load_report(name)) is not None:
            return [report]
    opened = open_checkpoint(name)
    evaluations = storage.join(opened.output, "evaluations")
    files = report_files(evaluations, protocol_id, opened.name)
    reports = [report for report in read_reports(files) if report.checkpoint_digest == opened.digest]
    if not reports:
        wanted = f"of protocol {protocol_id}" if protocol_id else "of it"
        raise FileNotFoundError(f"no report {wanted} in {evaluations}; make one: raydit evaluate {name}")
    return [report for report in reports if not any(_holds(other, report) for other in reports)]


def read_reports(files: Sequence[str]) -> Iterator[EvaluationReport]:
    for file in opened_in_order(files):
        with file:
            yield EvaluationReport.from_json(file.read().decode())


def _holds(report: EvaluationReport, other: EvaluationReport) -> bool:
    """Whether a report repeats its evaluation with the other's seed."""
    seeds = len(report.repeats.get(report.headline, ()))
    further = range(report.protocol.seed + 1, report.protocol.seed + seeds)
    return other.protocol.seed in further and other.protocol == replace(report.protocol, seed=other.protocol.seed)


def step_of(report: EvaluationReport) -> int | None:
    """The training step, which stands in the name of the checkpoint."""
    match = re.search(r"step_(\d+)/?$", report.checkpoint.partition("?")[0])
    return int(match[1]) if match else None


def reports_in(folder: str) -> list[EvaluationReport]:
    """All reports of one protocol's folder that are of a known step, by step."""
    found = read_reports(report_files(folder, None))
    return sorted((report for report in found if step_of(report) is not None), key=lambda report: step_of(report) or 0)


def save_figures(folder: str, images_per_step: int = 0) -> list[str]:
    """Draw all reports in a protocol's folder: their first metric against the step, and precision against recall.

    images_per_step: the batch size, where it is known. Nothing for fewer than two reports.
    """
    return draw_figures(reports_in(folder), folder, images_per_step)


def draw_figures(reports: Sequence[EvaluationReport], folder: str, images_per_step: int) -> list[str]:
    """The same of reports that are read already."""
    if len(reports) < 2:
        return []
    figures = [save_png(curve_picture(reports, images_per_step), storage.join(folder, CURVE_FILE))]
    if points := [point for report in reports if (point := _tradeoff(report)) is not None]:
        title = f"protocol {reports[-1].protocol_id}, N = {reports[-1].protocol.num_samples:,}"
        figures.append(save_png(tradeoff_plot(title, points), storage.join(folder, TRADEOFF_FILE)))
    return figures


def _tradeoff(report: EvaluationReport) -> Tradeoff | None:
    """Precision and recall of as many samples as the protocol has; None where they were not measured."""
    named = {parse_metric_name(name)[1:]: name for name in report.metrics}
    names = [named.get((kind, report.protocol.num_samples)) for kind in ("precision", "recall")]
    if None in names:
        return None
    precision, recall = (report.estimate(name)[0] for name in names if name)
    return Tradeoff(step_of(report) or 0, precision, recall)


def curve_picture(reports: Sequence[EvaluationReport], images_per_step: int = 0):
    metric = reports[-1].headline
    points = []
    for report in reports:
        if metric in report.metrics:
            value, error = report.estimate(metric)
            points.append(StepValue(step_of(report) or 0, value, error or 0.0))
    title = f"{metric}, protocol {reports[-1].protocol_id}, N = {reports[-1].protocol.num_samples:,}"
    return step_plot(title, points, reports[-1].floor.get(metric), images_per_step)
