"""Reports that are there already: found by a checkpoint, a folder or a file, and drawn as a curve over steps."""

import re
from collections.abc import Sequence
from pathlib import Path

from evaluation.report import REPORT_FILE, EvaluationReport
from evaluation.step_plot import StepValue, step_plot
from pipelines.grids import save_png

CURVE_FILE = "curve.png"


def find_report(where: str, *, protocol_id: str | None = None, tracking_uri: str = "") -> EvaluationReport:
    """A report by its file or folder, or the report of a checkpoint by any of its names.

    protocol_id: which one, where a checkpoint has several. Raises FileNotFoundError and ValueError.
    """
    path = Path(where)
    if path.is_file() and path.suffix == ".json" or (path / REPORT_FILE).is_file():
        return EvaluationReport.load(path)
    from cluster import storage
    from pipelines.locate import open_checkpoint

    opened = open_checkpoint(where, tracking_uri=tracking_uri)
    evaluations = Path(storage.local_path(opened.output)) / "evaluations"
    files = sorted(evaluations.glob(f"{protocol_id or '*'}/{opened.name}/{REPORT_FILE}"))
    reports = [report for report in map(EvaluationReport.load, files) if report.checkpoint_digest == opened.digest]
    if len(reports) == 1:
        return reports[0]
    if not reports:
        wanted = f"of protocol {protocol_id}" if protocol_id else "of it"
        raise FileNotFoundError(f"no report {wanted} in {evaluations}; make one: raydit evaluate {where}")
    ids = ", ".join(report.protocol_id for report in reports)
    raise ValueError(f"{where} has reports of several protocols: found {ids}, expected one. Choose by --protocol ID")


def step_of(report: EvaluationReport) -> int | None:
    """The training step, which stands in the name of the checkpoint."""
    match = re.search(r"step_(\d+)/?$", report.checkpoint.partition("?")[0])
    return int(match[1]) if match else None


def reports_in(folder: Path) -> list[EvaluationReport]:
    """All reports of one protocol's folder that are of a known step, by step."""
    found = [EvaluationReport.load(file) for file in sorted(folder.glob(f"*/{REPORT_FILE}"))]
    return sorted((report for report in found if step_of(report) is not None), key=lambda report: step_of(report) or 0)


def save_curve(folder: Path) -> Path | None:
    """Draw the first metric of all reports in a protocol's folder against the step; None for fewer than two."""
    reports = reports_in(folder)
    if len(reports) < 2:
        return None
    return save_png(curve_picture(reports), folder / CURVE_FILE)


def curve_picture(reports: Sequence[EvaluationReport]):
    metric = reports[-1].headline
    points = []
    for report in reports:
        if metric in report.metrics:
            value, error = report.estimate(metric)
            points.append(StepValue(step_of(report) or 0, value, error or 0.0))
    title = f"{metric}, protocol {reports[-1].protocol_id}, N = {reports[-1].protocol.num_samples:,}"
    return step_plot(title, points, reports[-1].floor.get(metric))
