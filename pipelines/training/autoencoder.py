"""Training the autoencoder: what each worker does, and how rank 0 finishes and describes the result."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import storage
from dit.autoencoder import (
    Autoencoder,
    AutoencoderObjective,
    LatentScale,
    create_autoencoder,
    describe_autoencoder,
    images_from_uint8,
    psnr,
    save_autoencoder,
)
from dit.checkpoint import restore, save_checkpoint
from dit.config import RandomKind
from dit.metrics_window import WindowTotals
from dit.snapshot import Snapshot
from dit.train import create_state, train
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.training import AutoencoderTrainConfig
from pipelines.images.grids import labelled_grid, save_png
from pipelines.latents.autoencoder import AUTOENCODER_RECORD
from pipelines.training.batches import ImageBatch, image_batches, prefetch
from pipelines.training.cursor import DataCursor
from pipelines.training.image_files import ImageRows
from pipelines.training.order import WorkerShare
from pipelines.training.stop import StopExchange
from pipelines.training.worker import CheckpointWriter, Worker

TRAINING = "training"
"""Folder inside the autoencoder's with the checkpoints that its training resumes from; removed at the end."""
IMAGES = "images"
"""Folder inside that one with the images, in the files of `pipelines.training.image_files`."""
RECONSTRUCTIONS = "reconstructions.png"
GRID_COLUMNS = 10
"""Images in each of the grid's two rows of originals."""
STATISTICS_IMAGES = 4096
"""Images that the latents' statistics, and the PSNR, are measured on, at most."""
MEASURING_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class AutoencoderWorkerSettings:
    """What every worker of the autoencoder job is given."""

    train: AutoencoderTrainConfig
    seed: int
    random: RandomKind | None
    """How random numbers are drawn, as in the recipe."""
    image_size: int
    """Side of the images in pixels."""
    folder: str
    """Path or URI of the autoencoder."""
    images: list[Any]
    """Ray references to the files of the training images (`pipelines.training.image_files.ImageFile`)."""
    held_out: list[Any]
    """The same for held-out images; may be empty."""


@dataclass(frozen=True)
class AutoencoderRecord:
    """Content of the record that is written last into a trained autoencoder's folder."""

    psnr: float
    """Peak signal-to-noise ratio of reconstructions, in dB."""
    psnr_images: str
    """Number and kind of the images it was measured on, such as "180 held-out images"."""
    autoencoder: dict[str, Any]
    """What `dit.autoencoder.describe_autoencoder` says of the weights."""

    @classmethod
    def read(cls, folder: str) -> "AutoencoderRecord | None":
        """Read the record in a folder, by path or URI; None if its autoencoder is not finished."""
        file = storage.join(folder, AUTOENCODER_RECORD)
        if not storage.exists(file):
            return None
        record = storage.read_json(file)
        return cls(record["psnr"], record["psnr_images"], record.get("autoencoder", {}))


def autoencoder_worker(worker: Worker, settings: AutoencoderWorkerSettings) -> None:
    """Train as one worker: fetch the images, build the autoencoder, restore the newest checkpoint, run the loop.

    At the end, rank 0 writes the autoencoder with its averaged weights, unless the driver has stopped the training.
    """
    import ray

    config = settings.train
    size = settings.image_size
    images, held_out = (ImageRows(ray.get(files), size) for files in (settings.images, settings.held_out))
    torch.manual_seed(settings.seed)
    module = create_autoencoder(
        image_size=settings.image_size,
        latent_channels=config.latent_channels,
        downsample=config.downsample,
        width=config.width,
    )
    network = AutoencoderObjective(module, config.kl_weight, config.reconstruction or "mse").to(worker.device)
    state = create_state(network, config, worker.wrap)
    checkpoints = CheckpointFolder(storage.join(settings.folder, TRAINING))
    if newest := checkpoints.newest():
        restore(state, newest)
        state.open_window = DataCursor.of(newest).window_of(worker.rank, worker.num_workers)
    side = settings.image_size // config.downsample
    batches = image_batches(
        images,
        latent_shape=(config.latent_channels, side, side),
        seed=settings.seed,
        share=WorkerShare(worker.rank, worker.num_workers, config.global_batch_size),
        first_batch=state.batches,
        random=settings.random,
        device=worker.device,
    )
    writer = create_writer(worker, checkpoints, settings.seed)
    losses = image_losses(worker, config.global_batch_size)
    with closing(prefetch(batches)) as prefetched, worker.in_loop():
        stop = StopExchange(worker)
        train(state, prefetched, losses, config, report=worker.report, save=writer.save, stop=stop)
    writer.wait()
    if worker.rank == 0 and state.step == config.steps:
        state.ema.copy_to(network)
        finish_autoencoder(module.cpu(), settings.folder, images, held_out)
    if state.step == config.steps:
        worker.wait_for_all()
        for rows in (images, held_out):
            rows.remove_copies()


def create_writer(worker: Worker, checkpoints: CheckpointFolder, seed: int) -> CheckpointWriter:
    """Return a writer of the checkpoints that the training of the autoencoder resumes from."""

    def write(snapshot: Snapshot, windows: list[WindowTotals]) -> None:
        cursor = {"seed": seed} | ({"windows": [window.to_dict() for window in windows]} if windows else {})

        def save(folder: Path) -> None:
            save_checkpoint(snapshot, folder, {"stage": "autoencoder"}, cursor)

        checkpoints.write(snapshot.step, save)

    return CheckpointWriter(worker, write)


def image_losses(worker: Worker, global_batch_size: int) -> Callable[[nn.Module, ImageBatch], dict[str, Tensor]]:
    """Return the losses function of `dit.train.train`: a micro-batch's contribution to the mean over the share."""

    def losses(model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        share = len(batch.images) * worker.num_workers / global_batch_size
        return {name: value * share for name, value in model(batch.images, batch.noise).items()}

    return losses


def finish_autoencoder(module: nn.Module, folder: str, training: ImageRows, held_out: ImageRows) -> None:
    """Measure the latents' statistics and the reconstructions, and write the folder in diffusers' format, record last.

    module: as `create_autoencoder` returns it, on the CPU. folder: path or URI.
    """
    module.eval()
    images = training.read(range(min(len(training), STATISTICS_IMAGES)))
    local = Path(storage.local_folder_for(folder))
    save_autoencoder(module, local, latent_statistics(Autoencoder(module), images))
    originals = held_out.read(range(min(len(held_out), STATISTICS_IMAGES))) if len(held_out) else images
    kind = "held-out" if len(held_out) else "training"
    decoded = reconstruct_images(Autoencoder.load(local), originals)
    save_png(reconstruction_grid(originals, decoded, kind), str(local / RECONSTRUCTIONS))
    record = AutoencoderRecord(
        psnr=psnr(torch.from_numpy(originals), torch.from_numpy(decoded)),
        psnr_images=f"{len(originals):,} {kind} images",
        autoencoder=describe_autoencoder(local),
    )
    storage.write_json_atomically(str(local / AUTOENCODER_RECORD), asdict(record))
    if not storage.is_local(folder):
        storage.publish_folder(str(local), folder, last=AUTOENCODER_RECORD)


def latent_statistics(autoencoder: Autoencoder, images: np.ndarray) -> LatentScale:
    """Return per-channel mean and standard deviation of unscaled posterior draws over images, uint8 (N, H, W, 3)."""
    moments = torch.cat(
        [autoencoder.encode(images_from_uint8(batch)) for batch in torch.from_numpy(images).split(MEASURING_BATCH)]
    ).double()
    mean, log_variance = moments.chunk(2, dim=1)
    variance = mean.var(dim=(0, 2, 3), correction=0) + log_variance.exp().mean(dim=(0, 2, 3))
    return LatentScale(tuple(mean.mean(dim=(0, 2, 3)).tolist()), tuple(variance.sqrt().tolist()))


def reconstruct_images(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Encode images, uint8 (N, H, W, 3), to the posterior mean, and decode them again."""
    decoded = []
    for batch in torch.from_numpy(images).split(MEASURING_BATCH):
        mean = autoencoder.encode(images_from_uint8(batch)).chunk(2, dim=1)[0]
        decoded.append(autoencoder.decode(autoencoder.scale.scale(mean)))
    return torch.cat(decoded).numpy()


def reconstruction_grid(images: np.ndarray, decoded: np.ndarray, kind: str) -> Any:
    """Return a picture of some images, each above its reconstruction. kind: title of the originals' rows."""
    # Spread over all images, because neighbours are of one class.
    chosen = np.linspace(0, len(images) - 1, min(len(images), 2 * GRID_COLUMNS), dtype=int)
    rows = []
    for part in np.array_split(chosen, 2):
        rows += [(kind, images[part]), ("decoded", decoded[part])]
    return labelled_grid(rows)
