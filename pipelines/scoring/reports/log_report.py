"""An evaluation's report in MLflow: its numbers as metrics, its files as artifacts."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster import storage
from evaluation.plots.time_shares import plot_time_shares
from evaluation.protocol import EvaluationProtocol
from evaluation.report import REPORT_FILE, EvaluationReport
from pipelines.config.evaluate import EvaluateConfig
from pipelines.images.grids import save_png
from pipelines.tracking import tags
from pipelines.tracking.run_log import FIGURES, SCORE, DatasetRef, RunLog, log_sections

if TYPE_CHECKING:
    from PIL import Image

TIME_FILE = "time.png"
REFERENCE = "reference"
"""Name of a run's input: the first extractor's reference. The name of another extractor's has its name added."""


def log_evaluation_settings(run: RunLog, settings: EvaluateConfig, protocol: EvaluationProtocol) -> None:
    """Log what identifies an evaluation, which its protocol says, and what may be another when it resumes."""
    evaluate, drawn = asdict(settings), vars(protocol)
    # Of some fields the protocol has another form, as of a rule for the time shift, or a checkpoint that guides.
    may_change = [name for name, value in evaluate.items() if name not in drawn or drawn[name] != value]
    log_sections(run, {"evaluate": evaluate, "protocol": protocol.to_dict()}, may_change={"evaluate": may_change})


def log_report(run: RunLog, report: EvaluationReport, folder: str, step: int = 0, model: str = "") -> None:
    """Log a report's numbers, and the files in its folder, to a run.

    step: the training step. model: digest of the checkpoint, to whose LoggedModel the metrics are attached; "": none.
    """
    tag_protocols(run, report)
    for name in report.averaged:
        _log_metrics(run, report, [name], step, model, report.summary_for(name), report.protocol_id_for(name))
    # The first extractor's metrics are logged last: MLflow's views and rankings show the newest ones by default.
    for part in reversed(report.parts):
        is_first = part.protocol == report.protocol
        _log_scores(run, part, step, model, REFERENCE if is_first else f"{REFERENCE}-{part.protocol.extractor}")
    run.metrics({f"floor/{name}": value for name, value in report.real_baseline.items()}, step)
    if report.reconstructions:
        run.metrics({f"reconstructions/{name}": value for name, value in report.reconstructions.items()}, step)
    if report.held_out_digest:
        run.tag(tags.HELD_OUT_DIGEST, report.held_out_digest)
    if report.disqualified:
        run.tag(tags.DISQUALIFIED, report.disqualified)
    if report.timings:
        run.metrics({f"evaluate/{name}": seconds for name, seconds in report.timings.items()}, step)
        run.artifact(save_png(plot_timings(report.timings), storage.join(folder, TIME_FILE)), FIGURES)
    run.artifact(storage.join(folder, REPORT_FILE))
    for name, file in report.artifacts.items():
        path = storage.join(folder, file)
        run.artifact(path)
        if file.endswith(".png"):
            run.image(path, name, step)
    if model and "samples" in report.artifacts:
        run.model_picture(model, report.artifacts["samples"])
    if model and not report.disqualified:
        for name in report.averaged:
            run.scores(model, {name: report.metrics[name]}, step, report.protocol_id_for(name))
        for part in reversed(report.parts):
            run.scores(model, part.metrics, step, part.protocol_id)


def tag_protocols(run: RunLog, report: EvaluationReport) -> None:
    """Tag a run with the protocols of a report by several extractors, besides the first one's, which it has."""
    if report.further:
        run.tag(tags.PROTOCOLS, json.dumps({each.extractor: each.protocol_id for each in report.protocols}))


def _log_scores(run: RunLog, report: EvaluationReport, step: int, model: str, reference: str) -> None:
    """Log the metrics of one extractor, with its protocol as their data set. reference: name of the reference's."""
    protocol = report.protocol
    run.input(name=reference, digest=protocol.reference_digest, source="reference", context="evaluation")
    _log_metrics(run, report, report.metrics, step, model, protocol.summary, protocol.protocol_id)


def _log_metrics(
    run: RunLog, report: EvaluationReport, names: Collection[str], step: int, model: str, summary: str, protocol_id: str
) -> None:
    """Log metrics of one protocol with their errors. summary: what the protocol says."""
    # MLflow's tables have a column for each metric and data set: scores by several protocols stand side by side.
    dataset = DatasetRef(summary, protocol_id)
    metrics = {f"{SCORE}{name}": report.metrics[name] for name in names}
    run.metrics(metrics, step, model=model, dataset=dataset)
    errors = {f"eval_error/{name}": report.errors[name] for name in names if name in report.errors}
    run.metrics(errors, step, model=model, dataset=dataset)


def plot_timings(timings: Mapping[str, float]) -> "Image.Image":
    """Plot the timings of a report: one bar for the command, and one for its workers' times added up."""
    parts = {name.removesuffix("_seconds"): seconds for name, seconds in timings.items()}
    workers = {name.removeprefix("workers_"): value for name, value in parts.items() if name.startswith("workers_")}
    command = {name: value for name, value in parts.items() if not name.startswith("workers_")}
    return plot_time_shares(
        "Where the time of the evaluation went", {"evaluation": command, "workers, added up": workers}
    )
