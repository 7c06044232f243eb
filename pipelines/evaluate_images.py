"""The evaluate-images job: score images from any source, such as samples that another tool drew."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.artifacts import digest_of
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.console import counted
from pipelines.images.ad_hoc_recipe import image_recipe, images_name
from pipelines.images.listing import ImageSource, Listing
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.images.preprocess import read_cropped
from pipelines.images.sources.folder import FolderSource
from pipelines.images.sources.table import TableSource
from pipelines.scoring.checks import check_scoring_inputs
from pipelines.scoring.class_distances import SampleClasses, check_class_distances
from pipelines.scoring.protocols.build_protocol import evaluation_protocols, images_protocol, protocols_identity
from pipelines.scoring.real_images.held_out_digest import has_other_real_images, held_out_digest
from pipelines.scoring.real_images.real_listing import listed_once
from pipelines.scoring.real_images.references import RealImages, extract_adm_images, reference_overrides
from pipelines.scoring.reports.build_report import spaced_positions
from pipelines.scoring.reports.log_report import log_evaluation_settings, log_report
from pipelines.scoring.reports.report_files import (
    load_matching_report,
    report_folder,
    set_aside_other_report,
    take_back_report,
    write_report,
)
from pipelines.scoring.reports.report_pictures import NUM_SAMPLES, Neighbours, report_pictures
from pipelines.scoring.reports.unlogged import is_unlogged, mark_logged
from pipelines.scoring.score_checkpoint import LapTimer, protocol_tags
from pipelines.scoring.score_extractors import (
    holds_all,
    record_folders,
    remove_all_records,
    remove_folders,
    score_extractors,
    with_earlier_scores,
)
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.shards import ScoringShard, compute_shards, make_shards, share_images, split_listing
from pipelines.stage import StageContext
from pipelines.tracking import tags
from pipelines.tracking.run_log import RunLog
from raydit.errors import NotFound

NUM_COMPARED = 16
"""Number of files whose content is hashed to tell two sets apart when all files have the same length."""


@listed_once()
def evaluate_images(
    path: str, *, config: Recipe, context: StageContext, force: bool = False
) -> tuple[EvaluationReport, str]:
    """Score all images of a source by a recipe's reference, or return an earlier report; also its folder.

    path: folder, table, archive, URI or ADM's .npz. The images are cropped as the reference's images were; each must
    be readable. force: score again. Raises NotFound or InvalidInput before any work if something is missing or does
    not fit.
    """
    evaluation = ImagesEvaluation.plan(path, ScoringSettings.from_recipe(config))
    report = evaluation.find_report()
    if report is not None and not force:
        say_images_finished(context, evaluation, report)
        return report, evaluation.folder
    context.require_writable()
    check_class_distances(evaluation.settings, evaluation.listing.class_names, path)
    return score_images(context, evaluation, force=force), evaluation.folder


@dataclass(frozen=True)
class ImagesEvaluation:
    """All images of a source, the protocols to score them by, and the folder of their report."""

    path: str
    """Path or URI of the source."""
    images: ImagesConfig
    listing: Listing
    digest: str
    """Digest of the images, by which an earlier report of them is found."""
    settings: ScoringSettings
    protocols: list[EvaluationProtocol]
    """The protocol of each extractor, in order."""
    folder: str
    """Path or URI of the report's folder."""

    @classmethod
    def plan(cls, path: str, settings: ScoringSettings) -> "ImagesEvaluation":
        """List the images of a source and plan to score them. Raises NotFound or InvalidInput if something does not
        fit."""
        images = scored_images(settings, path)
        source = open_source(images)
        listing = source.listing()
        protocol = images_protocol(settings, len(listing))
        check_scoring_inputs(settings, protocol)
        digest = images_digest(source, listing, images)
        folder = images_report_folder(settings.evaluations, protocol.protocol_id, path, digest)
        return cls(path, images, listing, digest, settings, evaluation_protocols(settings, protocol), folder)

    @property
    def protocol(self) -> EvaluationProtocol:
        """The protocol of the first extractor, which names the report's folder."""
        return self.protocols[0]

    def find_report(self) -> EvaluationReport | None:
        """Return the images' report if it holds the scores of all extractors, among others perhaps."""
        report = self.find_earlier_report()
        return report if report and holds_all(report, self.protocols, self.settings.evaluate) else None

    def find_earlier_report(self) -> EvaluationReport | None:
        """Return the images' report by the first protocol, of the same real images as far as it says."""
        report = load_matching_report(self.folder, self.digest)
        return None if report and has_other_real_images(report, self.settings) else report


def score_images(context: StageContext, evaluation: ImagesEvaluation, *, force: bool) -> EvaluationReport:
    """Score images and write the report; records of an interrupted run are reused, unless `force` is set."""
    settings, listing, folder = evaluation.settings, evaluation.listing, evaluation.folder
    earlier, shard_rows = evaluation.find_earlier_report(), settings.evaluate.shard_rows
    set_aside_other_report(folder, evaluation.digest)
    shard_folders = record_folders(folder, evaluation.digest, shard_rows, evaluation.protocols)
    records = [make_shards(each, split_listing(listing, shard_rows)) for each in shard_folders]
    if force:
        remove_folders(shard_folders)
    for line in (f"scores {listing.summary()}", *listing.notes):
        context.say("evaluate", line)
    real, timer = RealImages.of(settings, len(listing)), LapTimer()
    with open_images_run(context, evaluation) as run:
        compute_image_features(context, real, evaluation.images, records)
        timer.lap("features_seconds")
        # Evenly spaced, because the images of a class often lie together.
        shown = np.linspace(0, len(listing) - 1, min(NUM_SAMPLES, len(listing))).astype(int)
        scored = score_extractors(
            evaluation.protocols,
            real,
            records,
            checkpoint=evaluation.path,
            digest=evaluation.digest,
            classes=SampleClasses(listing.class_names, listing.labels),
            shown=shown,
        )
        report = replace(
            with_earlier_scores(scored.report, earlier),
            held_out_digest=held_out_digest(real),
            image_column=real.training.image_column,
        )
        timer.lap("scoring_seconds")
        neighbours = Neighbours(scored.reference, settings.images)
        pictures = draw_pictures(evaluation.images, listing.take(shown), scored.features, neighbours, shown)
        timer.lap("pictures_seconds")
        report = write_report(report, folder, pictures, timer.laps | scored.timings)
        log_written_report(run, report, folder)
        context.say("evaluate", f"{counted(len(listing), 'image')} scored, report in {folder} ({timer.total:.0f} s)")
    return report


def compute_image_features(
    context: StageContext, real: RealImages, images: ImagesConfig, records: list[list[ScoringShard]]
) -> None:
    """Compute the missing records of real images, and of the images that are scored.

    records: of the images, for each extractor.
    """
    settings = real.settings
    create_actor = partial(ScoringActor, evaluate=settings.evaluate, digests=settings.extractor_digests)
    if missing := real.missing_shards():
        create_reference_actor = partial(create_actor, with_absolute_paths(settings.images))
        compute_shards(context, "reference", missing, create_reference_actor, settings.evaluate)
    create_images_actor = partial(create_actor, with_absolute_paths(images))
    compute_shards(context, "evaluate", share_images(dict(enumerate(records))), create_images_actor, settings.evaluate)
    extract_adm_images(real, context)


def say_images_finished(context: StageContext, evaluation: ImagesEvaluation, report: EvaluationReport) -> None:
    """Say that an evaluation is finished, after doing what an interrupted one has left if the output is writable."""
    if context.is_writable:
        take_back_report(evaluation.folder, evaluation.digest)
        if is_unlogged(evaluation.folder, evaluation.digest):
            with open_images_run(context, evaluation) as run:
                log_written_report(run, report, evaluation.folder)
    context.skipped("evaluate", f"protocol {evaluation.protocol.label}, report in {evaluation.folder}")


@contextmanager
def open_images_run(context: StageContext, evaluation: ImagesEvaluation) -> Iterator[RunLog]:
    """Open the run of an evaluation, or that of an interrupted one with the same images and protocols."""
    identity = {"images": evaluation.digest, **protocols_identity(evaluation.protocols)}
    run_tags = {tags.IMAGES: evaluation.path, **protocol_tags(evaluation.protocol)}
    with context.run("evaluate", identity, run_tags) as run:
        log_evaluation_settings(run, evaluation.settings.evaluate, evaluation.protocol)
        yield run


def log_written_report(run: RunLog, report: EvaluationReport, folder: str) -> None:
    """Log a report, and remove the records that it was made of."""
    log_report(run, report, folder)
    mark_logged(folder, report.checkpoint_digest)
    remove_all_records(folder, report)


def scored_images(settings: ScoringSettings, path: str) -> ImagesConfig:
    """Describe a source whose images are all scored, in the recipe's size and crop; its layout is recognised."""
    return ImagesConfig(path=path, split="all", size=settings.images.size, crop=settings.images.crop)


def images_report_folder(evaluations: str, protocol_id: str, path: str, digest: str) -> str:
    """Return the path or URI of the folder for the report of images. digest: theirs.

    Earlier releases took all after the last dot for a suffix, also in the names of folders. A report that is there by
    such a name stays there.
    """
    name, earlier_name = images_name(path), Path(path.partition("?")[0]).stem or "images"
    folder, earlier = (report_folder(evaluations, protocol_id, each) for each in (name, earlier_name))
    if earlier_name in (name, "..") or load_matching_report(folder, digest) is not None:
        return folder
    return folder if load_matching_report(earlier, digest) is None else earlier


def images_digest(source: ImageSource, listing: Listing, images: ImagesConfig) -> str:
    """Return the digest of images to be scored, by which an earlier report of them is found.

    A listing identifies files by their names and lengths. Uncompressed images of one size all have the same length, so
    the digest then includes the content of some files as well.
    """
    identity = [listing.digest, images.size, images.crop]
    of_one_length = len(listing) > 1 and (listing.stamps == listing.stamps[0]).all()
    if of_one_length and isinstance(source, FolderSource | TableSource):
        keys = [listing.keys[index] for index in spaced_positions(len(listing), min(NUM_COMPARED, len(listing)))]
        content = source.files.read_each(keys)
        identity.append([sha256(each if isinstance(each, bytes) else b"").hexdigest() for each in content])
    return digest_of(identity)


def draw_pictures(
    images: ImagesConfig, listing: Listing, features: np.ndarray, neighbours: Neighbours, numbers: np.ndarray
) -> dict[str, bytes]:
    """Draw the pictures of a report from a few of its images.

    features: (N, D), of all N images of the listing. numbers: (N,), their positions among all scored images.
    """
    pixels, _, _ = read_cropped(with_absolute_paths(images), listing.keys, listing.locations)
    return report_pictures(pixels, listing.labels, features, listing.class_names, neighbours, numbers)


def reference_recipe(reference: str, images: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe that scores images against given statistics, with their extractor, image size and crop.

    reference: path or URI of the statistics. images: path or URI of the images, which names the output folder.
    Raises NotFound if there is no reference.
    """
    try:
        known = reference_overrides(reference)
    except NotFound:
        raise NotFound(
            f"--reference {reference}: nothing there", "an .npz file of reference statistics", "Correct the path"
        ) from None
    known = [f"evaluate.reference={json.dumps(reference)}", *known]
    return image_recipe("", f"outputs/{images_name(images)}", (*known, *overrides))
