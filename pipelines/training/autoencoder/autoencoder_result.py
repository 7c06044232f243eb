"""The result of training an autoencoder: measured, described, and written in diffusers' format."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster import storage
from dit.autoencoder import LatentScale, describe_autoencoder, images_from_uint8, save_autoencoder
from dit.autoencoders.losses import PERCEPTUAL_NETWORKS
from pipelines.config.autoencoder_training import AutoencoderTrainConfig, measured_at_once
from pipelines.images.grids import labelled_grid, save_png
from pipelines.latents.autoencoder import AUTOENCODER_RECORD
from pipelines.training.autoencoder.autoencoder_quality import ReconstructionQuality, measured_positions, reconstruct
from pipelines.training.data.image_files import ImageRows
from pipelines.training.validation import held_out_batches

RECONSTRUCTIONS = "reconstructions.png"
REPORT = "report.json"
"""File with the figures of the autoencoder, and what they were measured with."""
GRID_COLUMNS = 10
"""Images in each of the grid's two rows of originals."""
CHUNK_VALUES = 2**25
"""Most values of moments that are held at once for the latents' statistics: 0.4 GB with their copy in float64.

As many as 4,096 images of 256 pixels have with four channels and a downsampling of 8.
"""
FAMILY = "efficientnet-lite"
"""What the names of networks of one family begin with: one architecture in several sizes, trained alike."""


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


def finish_autoencoder(
    module: Any,
    folder: str,
    images: ImageRows,
    quality: ReconstructionQuality,
    is_held_out: bool,
    config: AutoencoderTrainConfig,
    scale: LatentScale | None = None,
    *,
    scored_by: str | None = None,
) -> None:
    """Measure the latents' statistics and the reconstructions, and write the folder in diffusers' format, record last.

    module: an AutoencoderKL with its final weights, on the worker's device; it leaves it when all is computed. folder:
    path or URI. images: those trained on. is_held_out: whether `quality` measures others. scale: of latents that stay
    as they were; None: as measured. scored_by: extractor of the recipe's scores. Collective: all workers measure, and
    rank 0 writes.
    """
    module.eval()  # no more: a compiled block would be compiled again if its parameters required no gradients
    measured = quality.measure(module)
    if quality.worker.rank or AutoencoderRecord.read(folder):  # a worker that was lost after writing has finished it
        return
    statistics = latent_statistics(lambda pixels: encode_moments(module, pixels), images)
    kind = "held-out" if is_held_out else "training"
    grid = reconstruction_grid(module, quality, kind)
    local = Path(storage.local_folder_for(folder))
    save_autoencoder(module.cpu(), local, scale or statistics)
    save_png(grid, str(local / RECONSTRUCTIONS))
    described = f"{quality.num_images:,} {kind} images"
    losses = describe_losses(config, quality, scored_by)
    report = {**measured, "images": described, "latents": asdict_scale(statistics), **losses}
    storage.write_json_atomically(str(local / REPORT), report)
    record = AutoencoderRecord(measured["psnr"], described, describe_autoencoder(local))
    storage.write_json_atomically(str(local / AUTOENCODER_RECORD), asdict(record))
    if not storage.is_local(folder):
        storage.publish_folder(str(local), folder, last=AUTOENCODER_RECORD)


def asdict_scale(scale: LatentScale) -> dict[str, list[float]]:
    """Return mean and standard deviation of each channel of the latents."""
    return {"mean": list(scale.mean), "std": list(scale.std)}


def describe_losses(
    config: AutoencoderTrainConfig, quality: ReconstructionQuality, scored_by: str | None
) -> dict[str, Any]:
    """Return what a reader of the figures must know: the scoring extractor, and what the training shares with it.

    scored_by: extractor of the recipe's scores; None: that of `quality`.
    """
    described: dict[str, Any] = {}
    extractor = quality.extractor
    if extractor is not None:
        described["extractor"] = {"name": extractor.name, "sha256": extractor.weights_sha256}
    if (network := config.perceptual_network) is not None:
        described["perceptual"] = {"network": network, "sha256": PERCEPTUAL_NETWORKS[network].sha256}
        if scored_by := scored_by or (extractor.name if extractor else None):
            described["perceptual"] |= {"scores": scored_by, "relation": perceptual_relation(network, scored_by)}
    return described


def perceptual_relation(network: str, extractor: str) -> str:
    """Return in words how the network of the perceptual distance is related to the extractor of the scores."""
    if network == extractor:
        return "the same network: its distances favour this autoencoder, which was trained on its features"
    if network.startswith(FAMILY) and extractor.startswith(FAMILY):
        return "another size of one family, trained on the same images: distances may favour this autoencoder"
    return "networks of two families, both of which may have learned from ImageNet"


@torch.no_grad()
def encode_moments(module: Any, pixels: Tensor) -> Tensor:
    """Return the posterior's moments float32 (N, 2C, h, w) of images (N, 3, H, W) in [-1, 1], on the module's device.

    module: an AutoencoderKL.
    """
    return module.encode(pixels.to(module.device)).latent_dist.parameters.float().contiguous()


def latent_statistics(encode: Callable[[Tensor], Tensor], images: ImageRows) -> LatentScale:
    """Return per-channel mean and std of unscaled posterior draws over the images at `measured_positions`.

    encode: returns the moments (N, 2C, h, w) of images (N, 3, H, W) in [-1, 1]. It gets batches of one size.
    """
    positions = measured_positions(len(images))
    batches = held_out_batches(len(positions), measured_at_once(images.size))

    def encode_batches() -> Iterator[Tensor]:
        remaining = len(positions)
        for rows in batches:
            moments = encode(images_from_uint8(torch.from_numpy(images.read(positions[rows])))).cpu()
            yield moments[:remaining]  # the last batch is filled up with images that have been encoded already
            remaining -= len(rows)

    num_positions, dims = 0, (0, 2, 3)
    mean = variance = torch.zeros((), dtype=torch.float64)
    for moments in _in_chunks(encode_batches()):
        chunk_mean, log_variance = moments.double().chunk(2, dim=1)
        chunk_variance = chunk_mean.var(dim=dims, correction=0) + log_variance.exp().mean(dim=dims)
        num_positions += (chunk_positions := chunk_mean[:, 0].numel())
        # Chan, Golub & LeVeque 1983. Of a single chunk, the results are its own, to the bit.
        share, delta = chunk_positions / num_positions, chunk_mean.mean(dim=dims) - mean
        mean = mean + share * delta
        variance = variance + share * (chunk_variance - variance) + share * (1 - share) * delta.square()
    return LatentScale(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))


def _in_chunks(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join batches of moments until they have CHUNK_VALUES values; a larger batch is a chunk of its own."""
    held: list[Tensor] = []
    for batch in batches:
        if held and sum(map(torch.numel, held)) + batch.numel() > CHUNK_VALUES:
            chunk, held = torch.cat(held), []
            yield chunk
        held.append(batch)
    yield torch.cat(held)


@torch.no_grad()
def reconstruction_grid(module: Any, quality: ReconstructionQuality, kind: str) -> Any:
    """Return a picture of some images, each above its reconstruction. kind: title of the originals' rows.

    They are reconstructed in batches of the size that `quality` measures, for which a compiled module is compiled.
    """
    # Spread over all images, because neighbours are of one class.
    count = quality.num_images
    chosen = quality.positions[np.linspace(0, count - 1, min(count, 2 * GRID_COLUMNS), dtype=int)]
    filled_up = np.resize(chosen, -(-len(chosen) // quality.batch_size) * quality.batch_size)
    originals = quality.images.read(filled_up)
    decoded = reconstruct(module, torch.from_numpy(originals)).cpu().numpy()
    rows = []
    for part in np.array_split(np.arange(len(chosen)), 2):
        rows += [(kind, originals[part]), ("decoded", decoded[part])]
    return labelled_grid(rows)
