"""The MLflow run that has the metrics of several checkpoints by one protocol, at their training steps."""

from evaluation.report import EvaluationReport
from pipelines.console import say
from pipelines.scoring.reports.log_report import tag_protocols
from pipelines.scoring.reports.report_curves import load_reports_by_step, save_curves, step_of
from pipelines.scoring.settings import EVALUATIONS
from pipelines.stage import StageContext
from pipelines.tracking.run_log import SCORE, RunLog


def series_identity(report: EvaluationReport) -> dict[str, str]:
    """Return the identity of the runs that have the metrics of several checkpoints by one protocol."""
    return {"protocol": report.protocol_id}


def is_in_series(context: StageContext, report: EvaluationReport) -> bool:
    """Return whether such a run has a report's step, or cannot get it: a command may have been interrupted before."""
    step = step_of(report)
    if step is None or not context.is_writable:
        return True
    return step in context.tracker.logged_steps(EVALUATIONS, series_identity(report))


def record_series(run: RunLog, folder: str, report: EvaluationReport, images_per_step: int) -> None:
    """Log a report's metrics at its training step to the run of all, and draw the curve over the protocol's folder."""
    step = step_of(report)
    if step is None:
        return
    tag_protocols(run, report)
    reports = load_reports_by_step(folder)
    figures = save_curves(reports, folder, images_per_step)
    for figure in figures:
        run.artifact(figure)
    if figures:
        say("evaluate", f"curve over {len(reports)} checkpoints: {figures[0]}")
    # Last, because a step whose metrics are logged counts as finished.
    run.metrics({f"{SCORE}{name}": report.estimate(name)[0] for name in report.metrics}, step)
