"""The evaluate job: checkpoint -> samples -> features -> metrics, by Ray actors; the same numbers on any cluster."""

import time
from dataclasses import asdict, replace

import numpy as np

from cluster import storage
from evaluation.extractors import weights_path
from evaluation.page import render_page
from evaluation.protocol import EvaluationProtocol, shard_ranges
from evaluation.reference import ReferenceStatistics
from evaluation.report import REPORT_FILE, EvaluationReport
from evaluation.score import Score, score
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.figures import FIGURES, timings_figure
from pipelines.images.grids import save_png
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.actors import (
    ScoringShard,
    Source,
    compute_features,
    load_features,
    load_preview_images,
    make_shards,
)
from pipelines.scoring.references import Features, RealImages, extract_adm_images, given_reference, load_real
from pipelines.scoring.report_files import load_report, save_figures, save_report
from pipelines.scoring.report_pictures import Neighbours, report_pictures
from pipelines.scoring.saved_samples import KeptImages
from pipelines.stage import StageContext
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.tracking.run_log import DatasetRef, RunLog

EVALUATIONS = "evaluations"
"""The part of an output that an evaluation writes, together with references/: nobody else evaluates there meanwhile."""
PAGE_FILE = "report.html"
TIME_FILE = "time.png"


def score_checkpoint(
    config: Recipe,
    context: StageContext,
    opened: LocatedCheckpoint,
    protocol: EvaluationProtocol,
    folder: str,
    kept: KeptImages | None = None,
) -> EvaluationReport:
    """The graph: reference and floor from real images; samples from the checkpoint; scores of both; the report."""
    tags = {"raydit.checkpoint": opened.origin, "raydit.checkpoint_digest": opened.digest}
    tags |= {"raydit.protocol_id": protocol.protocol_id}
    identity = {"checkpoint": opened.digest, "protocol": protocol.protocol_id}
    check_scoring(config, protocol)
    real, clock = RealImages.of(config), Clock()
    shards = sample_shards(config, opened, protocol, folder, kept)
    with context.run("evaluate", identity, tags) as run:
        run.params({"evaluate": asdict(config.evaluate), "protocol": protocol.to_dict()})
        arguments = (with_absolute_paths(config.images), config.evaluate, [Source(opened.shared, protocol, kept)])
        compute_features(context, "evaluate", [*real.missing_shards(), *shards], arguments, config.evaluate)
        extract_adm_images(real, context)
        clock.lap("features_seconds")
        reference, held_out = load_real(real)
        samples, seconds = load_features(shards)
        report = build_report(protocol, samples, reference, held_out, checkpoint=opened.origin, digest=opened.digest)
        clock.lap("scoring_seconds")
        class_names, neighbours = opened.config["class_names"], Neighbours(reference, config.images)
        pictures = report_pictures(
            load_preview_images(shards), samples["labels"], samples["features"], class_names, neighbours
        )
        clock.lap("pictures_seconds")
        report = write_report(report, folder, pictures, clock.laps | seconds)
        log_checkpoint(run, opened, opened.origin)
        track(run, report, folder, opened.step, opened.digest)
        for figure in save_figures(storage.split(folder)[0], config.train.global_batch_size):
            run.artifact(figure)
        storage.remove_folder(shard_folder(config, opened, folder))
        context.say("evaluate", f"{protocol.num_samples:,} samples scored, report in {folder} ({clock.total:.0f} s)")
    return report


def check_scoring(config: Recipe, protocol: EvaluationProtocol) -> None:
    """Refuse, before anything is computed, a reference of another extractor, size or crop, and absent weights."""
    if config.evaluate.reference:
        given_reference(config.evaluate.reference).check_compatible(
            protocol.extractor, protocol.extractor_sha256, config.images.size, config.images.crop
        )
    weights_path(config.evaluate.extractor, config.evaluate.extractor_weights)


def sample_shards(
    config: Recipe,
    opened: LocatedCheckpoint,
    protocol: EvaluationProtocol,
    folder: str,
    kept: KeptImages | None = None,
) -> list[ScoringShard]:
    parts = shard_ranges(protocol.num_samples, config.evaluate.shard_rows)
    return make_shards(shard_folder(config, opened, folder), parts, kept)


def shard_folder(config: Recipe, opened: LocatedCheckpoint, folder: str) -> str:
    """Where finished shards of samples lie; those of another checkpoint under the same step must not be taken."""
    return storage.join(folder, f"shards-{opened.digest[:12]}-{config.evaluate.shard_rows}")


def build_report(
    protocol: EvaluationProtocol,
    samples: Features,
    reference: ReferenceStatistics,
    held_out: Features | None,
    *,
    checkpoint: str,
    digest: str,
) -> EvaluationReport:
    """The numbers of a report: of samples, and of held-out real images as their floor."""
    generated = score_features(samples, reference, protocol, protocol.num_samples)
    floor, metrics = {}, dict(generated.metrics)
    if held_out:
        # Frechet distance is biased in N: the floor is to be read against as many samples.
        count = min(len(held_out["features"]), protocol.num_samples)
        floor = score_features(_spread(held_out, count), reference, protocol, count, errors=False).metrics
        if count < protocol.num_samples:
            fewer = score_features(_first(samples, count), reference, protocol, count, errors=False)
            metrics |= fewer.metrics
    return EvaluationReport(
        protocol=protocol,
        checkpoint=checkpoint,
        checkpoint_digest=digest,
        metrics=metrics,
        errors=generated.errors,
        floor=floor,
        curve=generated.curve,
        warnings=generated.warnings,
    )


def score_features(
    features: Features,
    reference: ReferenceStatistics,
    protocol: EvaluationProtocol,
    num_samples: int,
    errors: bool = True,
) -> Score:
    return score(
        features["features"],
        features.get("logits"),
        reference,
        extractor=protocol.extractor,
        num_samples=num_samples,
        spatial=features.get("spatial"),
        errors=errors,
    )


def _first(features: Features, count: int) -> Features:
    return {name: value[:count] for name, value in features.items()}


def _spread(features: Features, count: int) -> Features:
    """So many of them, evenly far apart: images often lie in the order of their classes."""
    return {name: value[np.arange(count) * len(value) // count] for name, value in features.items()}


def write_report(
    report: EvaluationReport, folder: str, pictures: dict[str, bytes], timings: dict[str, float]
) -> EvaluationReport:
    """Write pictures and page, then the report that names them."""
    files = {name: f"{name}.png" for name in pictures}
    for name, content in pictures.items():
        storage.write_atomically(storage.join(folder, files[name]), content)
    report = replace(report, timings=timings, artifacts={**files, "page": PAGE_FILE})
    storage.write_atomically(storage.join(folder, PAGE_FILE), render_page(report, pictures).encode())
    save_report(report, folder)
    return report


def report_folder_of(config: Recipe, protocol: EvaluationProtocol, name: str) -> str:
    """Where a report by a protocol lies; name: of the checkpoint, or of the images from elsewhere."""
    return storage.join(config.folder(EVALUATIONS), protocol.protocol_id, name)


def report_folder(config: Recipe, report: EvaluationReport) -> str:
    """Where a report lies: output/evaluations/<protocol_id>/<checkpoint's name>."""
    return report_folder_of(config, report.protocol, storage.split(report.checkpoint)[1])


def known_report(folder: str, digest: str) -> EvaluationReport | None:
    """The report in `folder`, if it is of this checkpoint."""
    report = load_report(folder)
    return report if report and report.checkpoint_digest == digest else None


def earlier_report(folder: str, digest: str) -> EvaluationReport | None:
    """The report in `folder`, if it is of this checkpoint; another one is kept under another name."""
    report = load_report(folder)
    if report is None or report.checkpoint_digest == digest:
        return report
    other = storage.join(folder, f"report-{report.checkpoint_digest[:12]}.json")
    storage.move_file(storage.join(folder, REPORT_FILE), other)
    return None


def track(run: RunLog, report: EvaluationReport, folder: str, step: int = 0, model: str = "") -> None:
    """The numbers, on the checkpoint's LoggedModel where there is one, and the report and the pictures with the run."""
    dataset = DatasetRef("reference", report.protocol.reference_digest)
    run.input(name="reference", digest=dataset[1], source="reference", context="evaluation")
    named = {f"eval/{name}": value for name, value in report.metrics.items()}
    run.metrics(named, step, model=model, dataset=dataset)
    errors = {f"eval_error/{name}": value for name, value in report.errors.items()}
    run.metrics(errors, step, model=model, dataset=dataset)
    run.metrics({f"floor/{name}": value for name, value in report.floor.items()}, step)
    if report.timings:
        run.metrics({f"evaluate/{name}": seconds for name, seconds in report.timings.items()}, step)
        run.artifact(save_png(timings_figure(report.timings), storage.join(folder, TIME_FILE)), FIGURES)
    run.artifact(storage.join(folder, REPORT_FILE))
    for name, file in report.artifacts.items():
        place = storage.join(folder, file)
        run.artifact(place)
        if file.endswith(".png"):
            run.image(place, name, step)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now

    @property
    def total(self) -> float:
        return sum(self.laps.values())
