"""Training the autoencoder: what each worker does."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import storage
from dit.autoencoder import Autoencoder, LatentScale, create_autoencoder, locate_autoencoder
from dit.autoencoders.losses import EfficientNetFeatures, PatchDiscriminator, PerceptualDistance
from dit.autoencoders.objective import AutoencoderObjective
from dit.checkpoint import restore, save_checkpoint
from dit.compilation import compile_network
from dit.config import RandomKind
from dit.hardware.measured_speeds import autoencoder_speedup
from dit.metrics_window import WindowTotals
from dit.precision import backward_in, missing_tf32
from dit.snapshot import Snapshot
from dit.train import create_state, train
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.autoencoder_training import AUTOENCODER_DEFAULTS, AutoencoderTrainConfig
from pipelines.training.autoencoder.autoencoder_quality import (
    AutoencoderValidation,
    ExtractorChoice,
    ReconstructionQuality,
)
from pipelines.training.autoencoder.autoencoder_result import finish_autoencoder
from pipelines.training.cursor import DataCursor
from pipelines.training.data.batches import ImageBatch, image_batches, prefetch
from pipelines.training.data.image_files import ImageRows, describe_unusable
from pipelines.training.data.order import WorkerShare
from pipelines.training.faster_dtype import explain_faster_dtype
from pipelines.training.group.messages import Validated
from pipelines.training.group.stop import StopExchange
from pipelines.training.group.worker import CheckpointWriter, Worker
from pipelines.training.nonfinite import NonFiniteGuard, go_on_after_rollbacks

TRAINING = "training"
"""Folder inside the autoencoder's with the checkpoints that its training resumes from; removed at the end."""
IMAGES = "images"
"""Folder inside that one with the images, in the files of `pipelines.training.data.image_files`."""
LEAST_VALIDATED = 2
"""Held-out images that validation needs: a Frechet distance is one of covariances."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderWorkerSettings:
    """What every worker of the autoencoder job is given."""

    train: AutoencoderTrainConfig
    """Its `start` is an absolute path, or an id that is pinned to a commit."""
    seed: int
    random: RandomKind | None
    """How random numbers are drawn, as in the recipe."""
    image_size: int
    """Side of the images in pixels."""
    folder: str
    """Path or URI of the autoencoder."""
    images: list[Any]
    """Ray references to the files of the training images (`pipelines.training.data.image_files.ImageFile`)."""
    held_out: list[Any]
    """The same for held-out images; may be empty."""
    max_quarantined: float
    """encode.max_quarantined: the share of unusable images that ends the training before it begins."""
    extractor: ExtractorChoice | None
    """Extractor for the Frechet distance of reconstructions; None if it is not measured."""
    scored_by: str | None = None
    """Extractor of the recipe's scores, whose relation to a perceptual network the report states."""

    @property
    def trained_size(self) -> int:
        """Side in pixels of what is trained on: of the crops, or of the images."""
        return self.train.crop or self.image_size


def autoencoder_worker(worker: Worker, settings: AutoencoderWorkerSettings) -> None:
    """Train as one worker, on the images of files that Ray tasks write."""
    import ray

    files = {"training": ray.get(settings.images), "held-out": ray.get(settings.held_out)}
    folder = storage.join(settings.folder, TRAINING)
    for kind, written in files.items():
        least = LEAST_VALIDATED if kind == "held-out" and settings.train.validate_every else 1
        if line := describe_unusable(written, kind, settings.max_quarantined, folder, least):
            worker.notice(line)
    train_on_images(worker, settings, *(ImageRows(written, settings.image_size) for written in files.values()))


def train_on_images(
    worker: Worker, settings: AutoencoderWorkerSettings, images: ImageRows, held_out: ImageRows
) -> None:
    """Build the autoencoder, restore the newest checkpoint, and run the loop.

    At the end, rank 0 writes the autoencoder with its averaged weights, unless the driver has stopped the training.
    """
    config, dtype = settings.train, settings.train.dtype or "float32"
    if device_name := missing_tf32(dtype, worker.device):
        worker.notice(f"autoencoder.train.dtype = 'tf32': {device_name} has no TF32, so training continues in float32")
    network, scale = create_objective(worker, settings)
    # Before it starts, the discriminator gets no gradients, so that its optimizer starts with it.
    some_unused = bool(config.adversarial_start)
    state = create_state(
        network, config, lambda network: worker.wrap(network, some_unused=some_unused), network.discriminator
    )
    checkpoints = CheckpointFolder(storage.join(settings.folder, TRAINING))
    newest = checkpoints.newest()
    explain_faster_dtype(worker, dtype, autoencoder_speedup("autoencoder.train"), is_begun=newest is not None)
    if newest:
        restore(state, newest)
        state.open_window = DataCursor.of(newest).window_of(worker.rank, worker.num_workers)
    writer = create_writer(worker, checkpoints, settings.seed)
    guard = NonFiniteGuard(
        worker,
        section="autoencoder.train",
        on_nonfinite=config.on_nonfinite or "stop",
        max_skipped=config.max_skipped or AUTOENCODER_DEFAULTS["max_skipped"],
        describe_images=lambda batch: f"{config.global_batch_size} images are finite, as all stored images are",
    )
    quality = ReconstructionQuality(worker, held_out if len(held_out) else images, settings.extractor)

    def report_validation(step: int, measured: dict[str, float]) -> None:
        if worker.rank == 0:
            worker.send(Validated(step, measured))

    def run() -> None:
        batches = training_batches(worker, settings, images, first_batch=state.batches)
        with closing(prefetch(batches)) as prefetched, worker.in_loop():
            train(
                state,
                prefetched,
                image_losses(worker, config),
                config,
                report=worker.report,
                validate=AutoencoderValidation(quality, report_validation) if config.validate_every else None,
                validate_every=config.validate_every or 1,
                save=writer.save,
                on_nonfinite=guard,
                backward=partial(backward_in, worker.device, dtype),
                stop=StopExchange(worker, writer),
            )
            writer.wait()  # inside, because a driver that was asked to stop waits only for workers in the loop

    go_on_after_rollbacks(run, guard, state, checkpoints, writer, worker)
    if state.step == config.steps:
        state.ema.copy_to(network)
        is_held_out, scored_by = len(held_out) > 0, settings.scored_by
        finish_autoencoder(
            network.autoencoder, settings.folder, images, quality, is_held_out, config, scale, scored_by=scored_by
        )
        worker.wait_for_all()
        for rows in (images, held_out):
            rows.remove_copies()


def create_objective(
    worker: Worker, settings: AutoencoderWorkerSettings
) -> tuple[AutoencoderObjective, LatentScale | None]:
    """Build what is trained, with the same initial weights in every worker, and the losses, on the worker's device.

    Also returns the scale of the latents, if it is to stay that of a pretrained autoencoder.
    """
    config = settings.train
    torch.manual_seed(settings.seed)
    autoencoder, scale = create_module(settings)
    discriminator = PatchDiscriminator(settings.trained_size) if config.adversarial_weight else None
    perceptual = None
    if config.perceptual_network is not None:
        features = EfficientNetFeatures(config.perceptual_network).to(worker.device)
        if worker.device.type == "cpu":  # twice as fast there
            features.to(memory_format=torch.channels_last)
        perceptual = PerceptualDistance(features)
    if config.compile:
        for half in (autoencoder.encoder, autoencoder.decoder):
            compile_network(half)
    objective = AutoencoderObjective(
        autoencoder,
        config.kl_weight,
        config.reconstruction or "mse",
        dtype=config.dtype or "float32",
        perceptual=perceptual,
        perceptual_weight=config.perceptual_weight or 1.0,
        discriminator=discriminator,
        adversarial_weight=config.adversarial_weight or 0.0,
        mean_over_workers=worker.mean_tensor,
    )
    return objective.to(worker.device), scale


def create_module(settings: AutoencoderWorkerSettings) -> tuple[Any, LatentScale | None]:
    """Return the AutoencoderKL to train, a new one or the one of `start`, and its scale if only its decoder is trained.

    If only the decoder is trained, the encoder's parameters require no gradient.
    """
    config = settings.train
    if config.start is None:
        module = create_autoencoder(
            image_size=settings.image_size,
            latent_channels=config.latent_channels,
            downsample=config.downsample,
            width=config.width,
        )
        return module, None
    started = Autoencoder.load(locate_autoencoder(config.start))
    module = started.module.train().requires_grad_(True)
    if not config.decoder_only:
        return module, None
    for part in (module.encoder, module.quant_conv):
        if part is not None:
            part.requires_grad_(False)
    return module, started.scale


def training_batches(
    worker: Worker, settings: AutoencoderWorkerSettings, images: ImageRows, *, first_batch: int
) -> Any:
    """Return this worker's share of all batches from number `first_batch` on."""
    config = settings.train
    side = settings.trained_size // config.downsample
    return image_batches(
        images,
        latent_shape=(config.latent_channels, side, side),
        seed=settings.seed,
        share=WorkerShare(worker.rank, worker.num_workers, config.global_batch_size),
        first_batch=first_batch,
        random=settings.random,
        crop=config.crop,
        device=worker.device,
    )


def create_writer(worker: Worker, checkpoints: CheckpointFolder, seed: int) -> CheckpointWriter:
    """Return a writer of the checkpoints that the training of the autoencoder resumes from."""

    def write(snapshot: Snapshot, windows: list[WindowTotals]) -> None:
        cursor = {"seed": seed} | ({"windows": [window.to_dict() for window in windows]} if windows else {})

        def save(folder: Path) -> None:
            save_checkpoint(snapshot, folder, {"stage": "autoencoder"}, cursor)

        checkpoints.write(snapshot.step, save)

    return CheckpointWriter(worker, write)


def image_losses(
    worker: Worker, config: AutoencoderTrainConfig
) -> Callable[[nn.Module, ImageBatch], dict[str, Tensor]]:
    """Return the losses function of `dit.train.train`: a micro-batch's contribution to the mean over the share."""

    def losses(model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        share = len(batch.images) * worker.num_workers / config.global_batch_size
        # Counted in batches, which are known here, and not in steps, some of which the device may still be computing.
        adversarial = bool(config.adversarial_weight) and int(batch.numbers[0]) >= (config.adversarial_start or 0)
        return {name: value * share for name, value in model(batch.images, batch.noise, adversarial).items()}

    return losses
