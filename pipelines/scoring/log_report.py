"""An evaluation's report in MLflow: its numbers as metrics, its files as artifacts."""

from cluster import storage
from evaluation.report import REPORT_FILE, EvaluationReport
from pipelines.figures import FIGURES, plot_timings
from pipelines.images.grids import save_png
from pipelines.tracking.run_log import DatasetRef, RunLog

TIME_FILE = "time.png"


def log_report(run: RunLog, report: EvaluationReport, folder: str, step: int = 0, model: str = "") -> None:
    """Log a report's numbers, and the files in its folder, to a run.

    step: the training step. model: digest of the checkpoint, to whose LoggedModel the metrics are attached; "": none.
    """
    dataset = DatasetRef("reference", report.protocol.reference_digest)
    run.input(name="reference", digest=dataset.digest, source="reference", context="evaluation")
    metrics = {f"eval/{name}": value for name, value in report.metrics.items()}
    run.metrics(metrics, step, model=model, dataset=dataset)
    errors = {f"eval_error/{name}": value for name, value in report.errors.items()}
    run.metrics(errors, step, model=model, dataset=dataset)
    run.metrics({f"floor/{name}": value for name, value in report.real_baseline.items()}, step)
    if report.timings:
        run.metrics({f"evaluate/{name}": seconds for name, seconds in report.timings.items()}, step)
        run.artifact(save_png(plot_timings(report.timings), storage.join(folder, TIME_FILE)), FIGURES)
    run.artifact(storage.join(folder, REPORT_FILE))
    for name, file in report.artifacts.items():
        path = storage.join(folder, file)
        run.artifact(path)
        if file.endswith(".png"):
            run.image(path, name, step)
