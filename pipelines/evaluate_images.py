"""Images from elsewhere: reference statistics of them, and scores of a model's images that were sampled by others."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cluster import storage
from evaluation.extractors import EXTRACTORS, INCEPTION, extractor_name, extractor_sha256
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.artifacts import digest_of
from pipelines.config.reader import image_recipe
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.listing import Listing
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.images.preprocess import read_cropped
from pipelines.scoring.actors import compute_features, listing_parts, load_features, make_shards
from pipelines.scoring.references import RealImages, extract_adm_images, given_reference, load_real, reference_digest
from pipelines.scoring.report_pictures import SAMPLES, Neighbours, report_pictures
from pipelines.scoring.score_checkpoint import (
    Clock,
    build_report,
    check_scoring,
    earlier_report,
    report_folder_of,
    track,
    write_report,
)
from pipelines.stage import StageContext


def reference_recipe(reference: str, images: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe that scores images against given statistics, as their extractor, size and crop demand."""
    try:
        statistics = given_reference(reference)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--reference {reference}: nothing there; expected an .npz file of reference statistics"
        ) from None
    known = [f"evaluate.reference={json.dumps(reference)}"]
    name = next((name for name in EXTRACTORS if statistics.extractor in (name, f"{name}-{_short(statistics)}")), None)
    known += [f"evaluate.extractor={name or INCEPTION}"]
    known += [f"images.size={statistics.size}"] if statistics.size else []
    known += [f"images.crop={statistics.crop}"] if statistics.crop else []
    return image_recipe("", f"outputs/{Path(images).stem or 'images'}", (*known, *overrides))


def _short(statistics: ReferenceStatistics) -> str:
    return statistics.extractor_sha256[:8]


def evaluate_images(
    path: str, *, config: Recipe, context: StageContext, force: bool = False
) -> tuple[EvaluationReport, str]:
    """Score all images of a source (folder, table, archive, ADM's .npz) by a recipe's reference; report and folder.

    They are cropped as the reference's images were. Every one must be readable. Raises FileNotFoundError or ValueError
    before any work if something does not fit.
    """
    images = external_images(config, path)
    listing = open_source(images).listing()
    protocol = images_protocol(config, len(listing))
    check_scoring(config, protocol)
    name = Path(path.partition("?")[0]).stem or "images"
    folder = report_folder_of(config, protocol, name)
    digest = digest_of([listing.digest, images.size, images.crop])
    report = earlier_report(folder, digest)
    if report is not None and not force:
        context.skipped("evaluate", f"protocol {protocol.protocol_id}, report in {folder}")
        return report, folder
    work = storage.join(folder, f"shards-{digest[:12]}-{config.evaluate.shard_rows}")
    shards = make_shards(work, listing_parts(listing, config.evaluate.shard_rows))
    if force:
        storage.remove_folder(work)
    real, clock = RealImages.of(config), Clock()
    tags = {"raydit.images": path, "raydit.protocol_id": protocol.protocol_id}
    with context.run("evaluate", {"images": digest, "protocol": protocol.protocol_id}, tags) as run:
        run.params({"evaluate": asdict(config.evaluate), "protocol": protocol.to_dict()})
        if missing := real.missing_shards():
            compute_features(
                context, "reference", missing, (with_absolute_paths(config.images), config.evaluate), config.evaluate
            )
        compute_features(context, "evaluate", shards, (with_absolute_paths(images), config.evaluate), config.evaluate)
        extract_adm_images(real, context)
        clock.lap("features_seconds")
        reference, held_out = load_real(real)
        features, seconds = load_features(shards)
        report = build_report(protocol, features, reference, held_out, checkpoint=path, digest=digest)
        clock.lap("scoring_seconds")
        pictures = external_pictures(images, listing, features["features"], Neighbours(reference, config.images))
        clock.lap("pictures_seconds")
        report = write_report(report, folder, pictures, clock.laps | seconds)
        track(run, report, folder)
        storage.remove_folder(work)
        context.say("evaluate", f"{len(listing):,} images scored, report in {folder} ({clock.total:.0f} s)")
    return report, folder


def external_images(config: Recipe, path: str) -> ImagesConfig:
    """A source of images to be scored, in the recipe's size and crop; the layout is recognised, all of it is taken."""
    return ImagesConfig(path=path, split="all", size=config.images.size, crop=config.images.crop)


def images_protocol(config: Recipe, num_images: int) -> EvaluationProtocol:
    """What is known of images from elsewhere: how many they are, and how they are scored."""
    chosen = config.evaluate
    weights = extractor_sha256(chosen.extractor, chosen.extractor_weights)
    return EvaluationProtocol(
        num_samples=num_images,
        sampler="unknown",
        sampling_steps=1,
        decoder="unknown",
        uint8_rule="unknown",
        extractor=extractor_name(chosen.extractor, weights),
        extractor_sha256=weights,
        reference_digest=reference_digest(config),
    )


def external_pictures(
    images: ImagesConfig, listing: Listing, features: np.ndarray, neighbours: Neighbours
) -> dict[str, bytes]:
    """Evenly spaced images: those of one class often stand together."""
    shown = np.linspace(0, len(listing) - 1, min(SAMPLES, len(listing))).astype(int)
    chosen = listing.take(shown)
    places = None if chosen.places is None else chosen.places.tolist()
    pixels, _, _ = read_cropped(with_absolute_paths(images), chosen.keys, places)
    return report_pictures(pixels, chosen.labels, features[shown], listing.class_names, neighbours)
