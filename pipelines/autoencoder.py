"""The autoencoder job: a pretrained autoencoder by id, or one trained on the recipe's own images by Ray Train."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster import storage
from pipelines.artifacts import SUPERSEDED, Artifact, settings_identity, superseded_folders
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.autoencoder_training import AUTOENCODER_DEFAULTS, AutoencoderTrainConfig
from pipelines.config.evaluate import path_for
from pipelines.config.recipe import Recipe, random_setting
from pipelines.config.training import NON_IDENTITY_FIELDS
from pipelines.images.held_out import split_images
from pipelines.images.listing import Listing
from pipelines.images.validation import held_out_source
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER, AutoencoderHandle, autoencoder_of
from pipelines.latents.held_out import require_training
from pipelines.latents.identity import LATER_FIELDS, PREPROCESSING_FIELDS
from pipelines.latents.recorded_images import list_images, require_classes
from pipelines.stage import JobContext, job
from pipelines.tracking.run_log import RunLog, log_sections
from pipelines.training.autoencoder.autoencoder_monitor import AutoencoderMonitor, finish_run
from pipelines.training.autoencoder.autoencoder_quality import ExtractorChoice
from pipelines.training.autoencoder.autoencoder_result import AutoencoderRecord
from pipelines.training.autoencoder.autoencoder_start import find_start, refuse_own_start, require_start
from pipelines.training.autoencoder.autoencoder_worker import (
    IMAGES,
    LEAST_VALIDATED,
    TRAINING,
    AutoencoderWorkerSettings,
    autoencoder_worker,
)
from pipelines.training.data.image_files import wait_for_running, write_image_files
from pipelines.training.group.run_workers import RAY_FOLDER, run_workers
from pipelines.training.starting.damage import set_aside_damaged
from raydit.errors import InvalidInput, NotFound

START_DIGEST = "start_sha256"
"""Entry of an autoencoder's identity: the digest of the weights that its training starts from, wherever they lie."""


@job
def train_autoencoder(config: Recipe, *, context: JobContext) -> AutoencoderHandle:
    """Train the recipe's own autoencoder, or resume where an earlier run stopped; a pretrained one needs no work."""
    handle = autoencoder_of(config)
    settings = config.autoencoder.train
    if settings is None:
        where = "" if Path(handle.id).is_dir() else f" in {handle.folder()}"
        context.say("autoencoder", f"nothing to train: {handle.id}{where} is pretrained")
        return handle
    config, images = list_images(config)
    listing, held_out = split_images(config.images, images)
    require_training(config, listing)
    artifact = autoencoder_artifact(config, settings, listing)
    folder = artifact.folder
    require_classes(config, listing.class_names, listing.columns, folder)
    refuse_unused_averages(settings, artifact)

    def prepare_work() -> ExtractorChoice | None:
        extractor = require_measurable(config, settings, held_out)
        context.prepare_work(settings, "autoencoder")
        return extractor

    artifact.prepare(is_finished=has_record, before_move=prepare_work)
    if record := AutoencoderRecord.read(folder):
        if storage.exists(storage.join(folder, TRAINING)):
            with context.run("autoencoder", artifact.recorded() or artifact.identity) as run:
                finish_run(run, record, folder, settings.steps)
        context.skipped("autoencoder", f"{record.psnr:.1f} dB, in {folder}")
        return handle

    for line in (images.summary(), *images.notes):
        context.say("autoencoder", line)
    training = storage.join(folder, TRAINING)
    checkpoints = CheckpointFolder(training, superseded=storage.join(training, SUPERSEDED))
    set_aside_damaged(checkpoints, lambda text: context.say("autoencoder", text))
    begun = bool(checkpoints.last_step())
    extractor = prepare_work()
    with context.run("autoencoder", artifact.recorded() or artifact.identity, resumes=None if begun else "") as run:
        log_autoencoder_settings(run, config, settings)
        progress = context.progress("autoencoder", total=settings.steps, unit="steps")
        image_folder = storage.join(training, IMAGES)
        worker_settings = AutoencoderWorkerSettings(
            train=replace(settings, start=find_start(settings)),
            seed=config.seed,
            random=config.random,
            image_size=config.images.size,
            folder=folder,
            images=write_image_files(config.images, listing, image_folder, begun=begun),
            held_out=write_image_files(held_out_source(config.images), held_out, image_folder, begun=begun),
            max_quarantined=config.encode.max_quarantined,
            extractor=extractor,
            scored_by=config.evaluate.extractor,
        )
        wait_for_running([*worker_settings.images, *worker_settings.held_out])
        run_workers(
            context,
            "autoencoder",
            settings,
            autoencoder_worker,
            worker_settings,
            AutoencoderMonitor(run, progress).on_message,
            ray_folder=config.folder(RAY_FOLDER),
        )
        record = AutoencoderRecord.read(folder)
        assert record is not None, "rank 0 writes the record at the end of training"
        finish_run(run, record, folder, settings.steps)
        progress.done(f"{record.psnr:.1f} dB on {record.psnr_images}, in {folder}")
    return handle


def log_autoencoder_settings(run: RunLog, config: Recipe, settings: AutoencoderTrainConfig) -> None:
    """Log what identifies a training, and what may be another when it resumes."""
    sections = {"images": asdict(config.images), "autoencoder": asdict(settings)}
    other_images = sections["images"].keys() - PREPROCESSING_FIELDS
    log_sections(run, sections, may_change={"images": other_images, "autoencoder": (*NON_IDENTITY_FIELDS, "start")})


def autoencoder_artifact(config: Recipe, settings: AutoencoderTrainConfig, listing: Listing) -> Artifact:
    """Return the artifact of the recipe's own autoencoder. listing: the training images.

    Raises NotFound or InvalidInput for a start that the training cannot begin from, unless it is finished.
    """
    identity = autoencoder_identity(config, settings, listing)
    folder = config.folder(TRAINED_AUTOENCODER)
    artifact = Artifact("autoencoder", folder, identity, {"autoencoder": AUTOENCODER_DEFAULTS}, LATER_FIELDS)
    if settings.start is None:
        return artifact
    refuse_own_start(settings.start, folder)
    return replace(artifact, identity=identity | {START_DIGEST: start_digest(settings, artifact)})


def start_digest(settings: AutoencoderTrainConfig, artifact: Artifact) -> str:
    """Return the digest of the start's weights; where the start is gone, the one that a finished autoencoder records.

    artifact: the autoencoder, whose identity lacks this digest. Raises the same errors as `require_start`.
    """
    try:
        return require_start(settings)["sha256"]
    except NotFound:
        for folder in (artifact.folder, *reversed(superseded_folders(*storage.split(artifact.folder)))):
            found = replace(artifact, folder=folder)
            recorded = (found.recorded() or {}).get(START_DIGEST)
            found = replace(found, identity=found.identity | {START_DIGEST: recorded})
            if recorded and has_record(folder) and not found.changes():
                return recorded
        raise


def find_autoencoder(config: Recipe, listing: Listing) -> Path | None:
    """Return the local folder of the recipe's autoencoder, where it may have been superseded; None if not trained yet.

    listing: the training images. A pretrained autoencoder is downloaded if necessary; raises NotFound if it cannot be.
    """
    settings = config.autoencoder.train
    if settings is None:
        return autoencoder_of(config).folder()
    artifact = autoencoder_artifact(config, settings, listing)
    found = artifact.find(has_record)
    return None if found is None else Path(storage.fetch_folder(found))


def refuse_unused_averages(settings: AutoencoderTrainConfig, artifact: Artifact) -> None:
    """Raise InvalidInput for power-function averages, which no autoencoder keeps; one that has begun continues."""
    if settings.ema_sigma_rels and artifact.find() is None:
        raise InvalidInput(
            f"autoencoder.train.ema_sigma_rels: found {list(settings.ema_sigma_rels)}, but training an autoencoder "
            "keeps only the average of ema_decay",
            "",
            "remove autoencoder.train.ema_sigma_rels",
        )


def has_record(folder: str) -> bool:
    """Return whether the autoencoder in a folder is finished."""
    return AutoencoderRecord.read(folder) is not None


def autoencoder_identity(config: Recipe, settings: AutoencoderTrainConfig, listing: Listing) -> dict[str, Any]:
    """Return what the weights depend on besides those of the start."""
    return {
        "seed": config.seed,
        **random_setting(config),
        "images": {
            "digest": listing.digest,
            "size": config.images.size,
            "crop": config.images.crop,
            **listing.column_identity,
        },
        "autoencoder": settings_identity(settings, (*NON_IDENTITY_FIELDS, "start")),
    }


def require_measurable(config: Recipe, settings: AutoencoderTrainConfig, held_out: Listing) -> ExtractorChoice | None:
    """Return what the Frechet distance of reconstructions is measured with; None if it is not.

    Raises InvalidInput or NotFound if what training needs besides its images is missing: held-out images, or weights of
    the extractor or the perceptual network. Those of the extractor are downloaded if necessary.
    """
    if settings.perceptual_network is not None:
        from dit.autoencoders.losses import find_perceptual_weights

        find_perceptual_weights(settings.perceptual_network)
    if settings.validate_every is None:
        return None
    if len(held_out) < LEAST_VALIDATED:
        found = "without held-out images" if not len(held_out) else f"with {len(held_out)} held-out image"
        raise InvalidInput(
            f"autoencoder.train.validate_every: found {settings.validate_every} {found}",
            f"at least {LEAST_VALIDATED} images that are not trained on",
            "set or raise images.held_out, set images.validation, or remove validate_every",
        )
    from evaluation.extractors import fetch_weights

    name, weights = config.evaluate.extractor, path_for(config.evaluate.extractor, config.evaluate.extractor_weights)
    fetch_weights(name, weights)
    return ExtractorChoice(name, weights and str(Path(weights).absolute()))
