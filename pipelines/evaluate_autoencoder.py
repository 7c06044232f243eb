"""The evaluate-autoencoder job: an autoencoder's reconstruction quality, its cost, and statistics of its latents."""

import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

import numpy as np

from cluster import storage
from evaluation.autoencoder_report import AutoencoderReport, require_comparable, short_names
from evaluation.extractors import fetch_weights
from evaluation.pages.autoencoder_page import PICTURE, render_autoencoder_page
from evaluation.report import REPORT_FILE
from pipelines.artifacts import digest_of
from pipelines.scoring.autoencoders.autoencoder_actors import DenoisingActor, DenoisingTask, ReconstructingActor
from pipelines.scoring.autoencoders.autoencoder_evaluation import (
    SHARDS,
    AutoencoderEvaluation,
    build_autoencoder_report,
    draw_reconstructions,
    reduce_records,
)
from pipelines.scoring.reports.report_files import PAGE_FILE
from pipelines.scoring.reports.unlogged import is_unlogged, mark_logged, mark_unlogged
from pipelines.scoring.score_checkpoint import LapTimer
from pipelines.scoring.workers.actor_pool import run_on_actors
from pipelines.scoring.workers.records import read_arrays
from pipelines.scoring.workers.shards import compute_shards
from pipelines.stage import StageContext
from pipelines.tracking import tags
from pipelines.tracking.provenance import code_record
from pipelines.tracking.run_log import DatasetRef, RunLog, log_sections
from raydit import __version__

STAGE = "autoencoders"
"""Stage of the runs in MLflow."""
PICTURES_FILE = "pictures.npz"
"""Originals and reconstructions of a report's picture, from which those of comparisons are drawn."""


class JudgedAutoencoder(NamedTuple):
    """The report on an autoencoder, and the path or URI of its folder."""

    report: AutoencoderReport
    folder: str


def evaluate_autoencoder(
    evaluation: AutoencoderEvaluation, *, context: StageContext, force: bool = False
) -> JudgedAutoencoder:
    """Judge an autoencoder, or return an earlier report by the same protocol; an interrupted evaluation resumes.

    force: measure again. Raises NotFound or InvalidInput before any work if something is missing or does not fit.
    """
    protocol, folder, settings = evaluation.protocol, evaluation.folder, evaluation.config.evaluate
    for each in evaluation.settings.each_extractor:
        fetch_weights(each.evaluate.extractor, each.extractor_weights)
    file = storage.join(folder, REPORT_FILE)
    timer, identity = LapTimer(), {"protocol": protocol.protocol_id}
    if storage.exists(file) and not force:
        report = AutoencoderReport.from_json(storage.read_bytes(file), file)
        if context.is_writable and is_unlogged(folder):  # it was interrupted between writing and logging the report
            with context.run(STAGE, identity, _run_tags(evaluation)) as run:
                _log_settings(run, evaluation)
                _log_written_report(run, report, folder)
        context.skipped(STAGE, f"{evaluation.name}, protocol {protocol.protocol_id}, report in {folder}")
        return JudgedAutoencoder(report, folder)
    if force:
        storage.remove_folder(evaluation.shard_folder)
    context.prepare_work(replace(settings, compile=False), STAGE)  # no network that samples
    with context.run(STAGE, identity, _run_tags(evaluation)) as run:
        _log_settings(run, evaluation)
        create_actor = partial(ReconstructingActor, evaluation.shared_images, settings, evaluation.source)
        shards = [*evaluation.real.missing_shards(), *evaluation.shards]
        compute_shards(context, STAGE, shards, create_actor, settings)
        timer.lap("images_seconds")
        denoising = _measure_denoising(evaluation, context)
        timer.lap("denoising_seconds")
        measured = reduce_records(evaluation.shards)
        report = build_autoencoder_report(evaluation, measured, denoising)
        timer.lap("scoring_seconds")
        _write_pictures(folder, measured.originals, measured.decoded)
        picture = draw_reconstructions(measured.originals, [measured.decoded], ["decoded"])
        report = _write_report(replace(report, timings=timer.laps), folder, picture)
        _log_written_report(run, report, folder)
        context.say(STAGE, f"{evaluation.name} judged on {protocol.num_images:,} images ({timer.total:.0f} s)")
    return JudgedAutoencoder(report, folder)


def write_comparison(judged: Sequence[JudgedAutoencoder], output: str) -> str:
    """Write a page with several autoencoders side by side, and return its path or URI.

    Raises InvalidInput if the reports are not comparable.
    """
    reports = [each.report for each in judged]
    require_comparable(reports)
    pictures = [_read_pictures(each.folder) for each in judged]
    originals, decoded = pictures[0]["originals"], [each["decoded"] for each in pictures]
    page = render_autoencoder_page(reports, draw_reconstructions(originals, decoded, short_names(reports)))
    name = digest_of([report.protocol.protocol_id for report in reports])[:12]
    file = storage.join(output, f"compare-{name}.html")
    storage.write_atomically(file, page.encode())
    return file


def _measure_denoising(evaluation: AutoencoderEvaluation, context: StageContext) -> dict[str, float]:
    """Train the tiny DiT on a worker, unless an interrupted evaluation has; returns its record."""
    file, settings = evaluation.denoising_file, evaluation.config.evaluate
    if not storage.exists(file):
        context.say(STAGE, "trains a tiny DiT on the latents")
        context.start_ray(settings, STAGE)
        probed = evaluation.source.probe_positions
        shards = tuple(shard for shard in evaluation.shards if probed.intersection(shard.positions))
        task = DenoisingTask(shards, file, evaluation.config.seed)
        create_actor = partial(DenoisingActor, settings)
        folders = [storage.split(file)[0]]
        for _ in run_on_actors([task], create_actor, settings, lambda text: context.say(STAGE, text), folders):
            pass
    record: dict[str, float] = storage.read_json(file)
    return record


def _write_report(report: AutoencoderReport, folder: str, picture: bytes) -> AutoencoderReport:
    """Write picture and page, then the report; return it with files, date and code."""
    report = replace(
        report,
        artifacts={PICTURE: f"{PICTURE}.png", "page": PAGE_FILE},
        code=code_record(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        raydit_version=__version__,
    )
    storage.write_atomically(storage.join(folder, report.artifacts[PICTURE]), picture)
    page = render_autoencoder_page([report], picture)
    storage.write_atomically(storage.join(folder, PAGE_FILE), page.encode())
    content = report.to_json().encode()
    mark_unlogged(folder, content)
    storage.write_atomically(storage.join(folder, REPORT_FILE), content)
    return report


def _write_pictures(folder: str, originals: np.ndarray, decoded: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, originals=originals, decoded=decoded)
    storage.write_atomically(storage.join(folder, PICTURES_FILE), buffer.getvalue())


def _read_pictures(folder: str) -> dict[str, np.ndarray]:
    with storage.open_file(storage.join(folder, PICTURES_FILE)) as file:
        return read_arrays(file)


def _run_tags(evaluation: AutoencoderEvaluation) -> dict[str, str]:
    protocol = evaluation.protocol
    return {
        tags.AUTOENCODER: evaluation.name,
        tags.IMAGES: evaluation.images.path,
        tags.PROTOCOL_ID: protocol.protocol_id,
        tags.PROTOCOL: protocol.summary,
    }


def _log_settings(run: RunLog, evaluation: AutoencoderEvaluation) -> None:
    """Log what identifies the evaluation, and as settings what may be another when it resumes."""
    evaluate = asdict(evaluation.config.evaluate)
    sections = {"protocol": asdict(evaluation.protocol), "evaluate": evaluate}
    log_sections(run, sections, may_change={"evaluate": evaluate.keys()})
    images = evaluation.images
    run.input(name="images", digest=evaluation.listing.digest, source=images.path, context="evaluation")


def _log_written_report(run: RunLog, report: AutoencoderReport, folder: str) -> None:
    """Log a report, and remove the records that it was made of, whatever the size of their shards."""
    _log_report(run, report, folder)
    mark_logged(folder)
    for name in storage.list_names(folder):
        if name.startswith(SHARDS):
            storage.remove_folder(storage.join(folder, name))


def _log_report(run: RunLog, report: AutoencoderReport, folder: str) -> None:
    """Log a report's numbers, with its protocol as their data set, and its files."""
    dataset = DatasetRef(report.protocol.summary, report.protocol.protocol_id)
    run.metrics({f"autoencoder/{name}": value for name, value in report.metrics.items()}, dataset=dataset)
    run.metrics({f"autoencoder/{name}": seconds for name, seconds in report.timings.items()})
    for file in (REPORT_FILE, *report.artifacts.values()):
        run.artifact(storage.join(folder, file))
    run.image(storage.join(folder, report.artifacts[PICTURE]), PICTURE, 0)
