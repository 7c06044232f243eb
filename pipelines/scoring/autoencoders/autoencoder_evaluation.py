"""Evaluation of autoencoders: how users name them, their protocols, and reports from the records of shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from evaluation.autoencoder_report import AutoencoderProtocol, AutoencoderReport, reconstruction_distance_name
from evaluation.extractors import ExtractorIdentity, find_cached_weights
from evaluation.latent_statistics import LatentStatistics
from evaluation.metrics import frechet_distance
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.artifacts import Artifact, digest_of
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.grids import encode_png, labelled_grid
from pipelines.images.held_out import split_images
from pipelines.images.listing import Listing
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.images.validation import held_out_source
from pipelines.latents.autoencoder import AUTOENCODER_RECORD, TRAINED_AUTOENCODER, AutoencoderHandle
from pipelines.scoring.autoencoders.autoencoder_actors import (
    NUM_PICTURES,
    AutoencoderShard,
    AutoencoderSource,
    ReconstructedShard,
    autoencoder_shards,
    read_reconstructed,
)
from pipelines.scoring.real_images.references import RealImages, load_real_features
from pipelines.scoring.reports.build_report import spaced_positions
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput

SHARDS = "shards-"
"""Start of the names of the folders of records in an evaluation's folder."""
MAX_IMAGES = 50_000
"""Images where no number is given: as many as published distances of reconstructions have."""
DEFAULT_SIZE = 256
DEFAULT_EXTRACTORS = ("efficientnet-lite0", "inception", "dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14")
"""Extractors that judge where none is named; others are asked for, so that protocols stay what they were."""
DIFFERENCE_FACTOR = 4
"""Factor by which pictures amplify the difference of a reconstruction from its original."""
COLUMNS = 10
"""Images in a row of the picture."""


def find_handle(name: str) -> AutoencoderHandle:
    """Return the autoencoder that a user names by hub id or path: of a diffusers folder, or of an output that has one.

    An output, or the autoencoder/ in it, may be a URI. Raises nothing: what is not there is found out when it is used.
    """
    if not storage.is_local(name) or Path(name).exists():
        folder = storage.absolute(name.rstrip("/"))
        output, last = storage.split(folder)
        for where in (folder, output if last == TRAINED_AUTOENCODER else folder):
            if storage.exists(storage.join(where, TRAINED_AUTOENCODER, AUTOENCODER_RECORD)):
                return AutoencoderHandle(TRAINED_AUTOENCODER, where)
        return AutoencoderHandle(folder, folder)
    return AutoencoderHandle(name, "")


def default_size(handle: AutoencoderHandle) -> int:
    """Return the side in pixels of images for an autoencoder: that it was trained on by raydit, or its only one; 256.

    diffusers' own `sample_size` says little: it has a default that most autoencoders were not trained on, and one that
    raydit trained further keeps that of its start.
    """
    from dit.autoencoders.size import read_config

    folder = handle.folder()
    if handle.id == TRAINED_AUTOENCODER:
        identity = Artifact("autoencoder", str(folder), {}).recorded() or {}
        size = identity.get("images", {}).get("size") or read_config(folder).get("sample_size", DEFAULT_SIZE)
        return int(size)
    return int(handle.describe().get("image_size", DEFAULT_SIZE))


def cached_extractors() -> list[str]:
    """Return those of DEFAULT_EXTRACTORS whose published weights are on this machine, the offline one first."""
    return [name for name in DEFAULT_EXTRACTORS if find_cached_weights(name) is not None]


def chosen_images(images: ImagesConfig, num_images: int | None) -> tuple[ImagesConfig, Listing]:
    """Return the images that autoencoders are judged on, evenly spaced over a source, and how to read them.

    They are the held-out ones where the settings hold some out, and otherwise all. num_images: None for at most
    MAX_IMAGES. Raises InvalidInput if there are fewer than num_images.
    """
    listing = open_source(images).listing()
    _, held_out = split_images(images, listing)
    source, listing = (held_out_source(images), held_out) if len(held_out) else (images, listing)
    if num_images is not None and num_images > len(listing):
        raise InvalidInput(f"--num {num_images:,}: found {len(listing):,} images", "as many or more", "lower --num")
    count = num_images or min(len(listing), MAX_IMAGES)
    source = replace(source, held_out=0.0, validation=None)
    return source, listing.take(spaced_positions(len(listing), count))


@dataclass(frozen=True)
class AutoencoderEvaluation:
    """One autoencoder, the images that it is judged on, and the folders that the evaluation works in."""

    handle: AutoencoderHandle
    config: Recipe
    """Its output holds the reports and the features of the originals."""
    images: ImagesConfig
    listing: Listing

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """What is known of the autoencoder: class, sha256 of the weights, shape and scale."""
        from dit.autoencoder import check_autoencoder
        from dit.autoencoders.kinds import latent_side

        folder = self.handle.folder()
        check_autoencoder(folder)
        recorded = self.handle.describe()
        latent_side(self.images.size, recorded)  # raises for a size that does not fit
        return recorded

    @cached_property
    def settings(self) -> ScoringSettings:
        """How images are scored."""
        return replace(ScoringSettings.from_recipe(self.config), images=self.images)

    @cached_property
    def real(self) -> RealImages:
        """The originals, of which the reference statistics are."""
        return RealImages(self.settings, self.listing, self.listing.take([]))

    @cached_property
    def protocol(self) -> AutoencoderProtocol:
        """The protocol. Raises InvalidInput for fewer images than the measurements need."""
        from dit.autoencoders.denoising_score import MIN_LATENTS, PROBE
        from dit.formats.autoencoder_digests import config_sha256

        if len(self.listing) < MIN_LATENTS:
            raise InvalidInput(f"{len(self.listing)} images", f"at least {MIN_LATENTS}", "give more images")
        described = {name: value for name, value in self.recorded.items() if name != "id"}
        return AutoencoderProtocol(
            images_digest=self.listing.digest,
            image_size=self.images.size,
            crop=self.images.crop,
            num_images=len(self.listing),
            seed=self.config.seed,
            autoencoder=self.recorded["sha256"],
            autoencoder_config=digest_of([described, config_sha256(self.handle.folder())]),
            dtype=self.config.encode.dtype,
            denoising=PROBE,
            extractors={each.extractor.name: _recorded(each.extractor) for each in self.settings.each_extractor},
        )

    @property
    def name(self) -> str:
        """How reports name the autoencoder: hub id, path or URI."""
        is_trained = self.handle.id == TRAINED_AUTOENCODER
        return storage.join(self.handle.output, TRAINED_AUTOENCODER) if is_trained else self.handle.id

    @property
    def folder(self) -> str:
        """Path or URI of the folder of the report."""
        return storage.join(self.settings.output, self.protocol.protocol_id)

    @property
    def shard_folder(self) -> str:
        """Path or URI of the folder of the records of shards."""
        return storage.join(self.folder, f"{SHARDS}{self.config.evaluate.shard_rows}")

    @property
    def denoising_file(self) -> str:
        """Path or URI of the record of the tiny DiT."""
        return storage.join(self.shard_folder, "denoising.json")

    @cached_property
    def shards(self) -> list[AutoencoderShard]:
        """The shards of the images."""
        return autoencoder_shards(self.shard_folder, self.listing, self.config.evaluate.shard_rows)

    @cached_property
    def source(self) -> AutoencoderSource:
        """Settings that are sent to workers."""
        from dit.autoencoders.denoising_score import LATENTS
        from dit.formats.autoencoder_digests import further_digests

        count = len(self.listing)
        return AutoencoderSource(
            handle=self.handle.with_absolute_paths(),
            encode=replace(self.config.encode, flip=False, compile=False),
            recorded={**self.recorded, **further_digests(self.handle.folder())},
            extractors=tuple(each.extractor.name for each in self.settings.each_extractor),
            seed=self.config.seed,
            num_images=count,
            picture_positions=frozenset(spaced_positions(count, min(count, NUM_PICTURES)).tolist()),
            probe_positions=frozenset(spaced_positions(count, min(count, LATENTS)).tolist()),
        )

    @property
    def shared_images(self) -> ImagesConfig:
        """The images for workers in other working directories."""
        return with_absolute_paths(self.images)


def _recorded(extractor: ExtractorIdentity) -> str:
    """Return what a protocol records of an extractor: the digest of its weights, and of preprocessing of its own."""
    if extractor.preprocessing is None:
        return extractor.sha256
    return digest_of([extractor.sha256, extractor.preprocessing])


@dataclass(frozen=True)
class MeasuredImages:
    """Totals over the records of all shards."""

    psnr: float
    """PSNR in dB, from the mean squared error over all images."""
    ssim: float
    features: dict[str, FeatureStatistics]
    """Feature statistics of the reconstructions, keyed by the extractor's name in the protocol."""
    latents: LatentStatistics
    originals: np.ndarray
    """(K, H, W, 3) uint8: the images of the picture."""
    decoded: np.ndarray
    moments_shape: tuple[int, ...]
    encode_seconds: float
    decode_seconds: float
    device: str


def reduce_records(shards: Sequence[AutoencoderShard]) -> MeasuredImages:
    """Reduce the records of shards, in order; only one is in memory at a time but for the pictures."""
    from dit.autoencoder import LEAST_SQUARED_ERROR  # imports torch

    errors, similarities, pictures, features = [], [], [], dict[str, FeatureStatistics]()
    latents: LatentStatistics | None = None
    seconds, record = np.zeros(2), None
    for record in read_reconstructed(shards):
        errors.append(record.squared_errors)
        similarities.append(record.similarities)
        pictures.append((record.originals, record.decoded))
        for name, array in record.features.items():
            features.setdefault(name, FeatureStatistics(array.shape[1])).update(array)
        latents = record.latents if latents is None else latents.merge(record.latents)
        seconds += record.encode_seconds, record.decode_seconds
    assert isinstance(record, ReconstructedShard) and latents is not None, "there is at least one shard"
    originals, decoded = (np.concatenate(each) for each in zip(*pictures, strict=True))
    error = float(np.concatenate(errors).mean())
    return MeasuredImages(
        psnr=float(10 * np.log10(255.0**2 / max(error, LEAST_SQUARED_ERROR))),
        ssim=float(np.concatenate(similarities).mean()),
        features=features,
        latents=latents,
        originals=originals,
        decoded=decoded,
        moments_shape=record.moments_shape,
        encode_seconds=float(seconds[0]),
        decode_seconds=float(seconds[1]),
        device=record.device,
    )


def build_autoencoder_report(
    evaluation: AutoencoderEvaluation, measured: MeasuredImages, denoising: dict[str, float]
) -> AutoencoderReport:
    """Build the report of an evaluation. denoising: "loss" and "baseline", of the record of the tiny DiT."""
    from dit.autoencoders.denoising_score import LATENTS

    count, metrics, warnings = len(evaluation.listing), {"psnr": measured.psnr, "ssim": measured.ssim}, []
    for each in evaluation.real.each_extractor:
        reference, _ = load_real_features(each)
        extractor = each.settings.extractor.name
        name = reconstruction_distance_name(extractor, count)
        metrics[name] = distance_between(reference, measured.features[extractor])
        if count < 2 * len(reference.mu):
            warnings.append(
                f"{name}: {count:,} images are fewer than twice the {len(reference.mu):,} feature dimensions. Compare "
                "it only with distances of as many images."
            )
    if count < LATENTS:
        warnings.append(
            f"denoising: {count:,} images are fewer than {LATENTS}: a ratio above 1 says that the tiny DiT has learned "
            "them by heart. Compare it only with ratios of as many images."
        )
    latents = measured.latents
    metrics |= {
        "bytes_per_image": float(np.prod(measured.moments_shape) * np.dtype(np.float16).itemsize),
        "encode_images_per_second": count / measured.encode_seconds,
        "decode_images_per_second": count / measured.decode_seconds,
        **latents.metrics(),
        "denoising_loss": denoising["loss"],
        "denoising_baseline": denoising["baseline"],
        "denoising_ratio": denoising["loss"] / denoising["baseline"],
    }
    return AutoencoderReport(
        protocol=evaluation.protocol,
        autoencoder=evaluation.name,
        kind=evaluation.recorded["class"],
        moments_shape=measured.moments_shape,
        metrics=metrics,
        channels={name: getattr(latents, name).tolist() for name in ("mean", "std", "kurtosis")},
        device=measured.device,
        images=evaluation.images.path,
        warnings=warnings,
    )


def distance_between(reference: ReferenceStatistics, reconstructions: FeatureStatistics) -> float:
    """Return the Frechet distance of reconstructions from their originals."""
    return frechet_distance(reference.mu, reference.sigma, reconstructions.mean, reconstructions.cov)


def draw_reconstructions(originals: np.ndarray, decoded: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Draw images, their reconstructions by one or several autoencoders, and the amplified differences, as a PNG file.

    originals, and each of decoded: uint8 (K, H, W, 3).
    """
    rows = []
    for start in range(0, len(originals), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows.append(("images", originals[part]))
        for name, images in zip(names, decoded, strict=True):
            difference = np.abs(originals[part].astype(int) - images[part]) * DIFFERENCE_FACTOR
            rows.append((name, images[part]))
            rows.append((f"difference x{DIFFERENCE_FACTOR}", difference.clip(0, 255).astype(np.uint8)))
    return encode_png(labelled_grid(rows))
