"""How close an autoencoder's reconstructions are to their images: PSNR, SSIM and the Frechet distance.

Images are computed in batches that are the same for any number of workers, and reduced in the order of the data set, so
that the figures are the same, to the bit, on any number of workers and after any interruption.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit.autoencoder import error_in_db, images_from_uint8, images_to_uint8
from dit.train import TrainState
from evaluation.extractors import FeatureExtractor, create_extractor
from evaluation.image_quality import structural_similarities
from evaluation.metric_names import metric_name
from evaluation.metrics import frechet_distance
from evaluation.statistics import FeatureStatistics
from pipelines.config.autoencoder_training import measured_at_once
from pipelines.scoring.reports.build_report import scattered_positions
from pipelines.training.data.image_files import ImageRows
from pipelines.training.group.worker import Worker
from pipelines.training.validation import held_out_batches

MEASURED_IMAGES = 4096
"""Images that reconstructions, and the latents' statistics, are measured on, at most."""


def measured_positions(num_images: int) -> np.ndarray:
    """Return the positions of the images that are measured: all, or one of each of MEASURED_IMAGES equal stretches.

    Images often lie in the order of their classes, of which the first ones would represent a few.
    """
    return scattered_positions(num_images, min(num_images, MEASURED_IMAGES))


@dataclass(frozen=True)
class ExtractorChoice:
    """The extractor of a recipe, in whose features reconstructions are compared."""

    name: str
    weights: str | None
    """Path of its weights; None: the published ones."""

    def create(self, device: torch.device) -> FeatureExtractor:
        """Build the extractor on a device."""
        return create_extractor(self.name, self.weights and Path(self.weights), str(device))


class BatchQuality(NamedTuple):
    """What one worker measures on a batch of n images."""

    squared_errors: np.ndarray
    """(n,) float64: sums over pixels and channels, which are integers."""
    similarities: np.ndarray
    """(n,) float64."""
    features: np.ndarray
    """(n, D) float32 of the reconstructions; D = 0 without an extractor."""


class ReconstructionQuality:
    """Measures reconstructions of the images at `measured_positions` of a set, each worker a part of them."""

    def __init__(self, worker: Worker, images: ImageRows, extractor: ExtractorChoice | None):
        """extractor: that of the Frechet distance; None: it is not measured."""
        self.worker, self.images = worker, images
        self.positions = measured_positions(len(images))
        """Positions of the images that are measured, in rising order."""
        self.num_images = len(self.positions)
        batches = [self.positions[rows] for rows in held_out_batches(self.num_images, measured_at_once(images.size))]
        self.batch_size = len(batches[0])
        """Images of every batch that is reconstructed."""
        share = -(-len(batches) // worker.num_workers)
        self._own = batches[worker.rank * share : (worker.rank + 1) * share]
        self.extractor = extractor.create(worker.device) if extractor else None
        self._real: FeatureStatistics | None = None

    @torch.no_grad()
    def measure(self, autoencoder: Any) -> dict[str, float]:
        """Return "psnr" in dB, "ssim" and the Frechet distance by its name, for an AutoencoderKL. Collective."""
        measured = [self._measure_batch(autoencoder, rows) for rows in self._own]
        errors, similarities, features = self._gather(measured)
        pixels = self.images.size**2 * 3
        quality = {
            "psnr": error_in_db(torch.tensor(errors.sum() / (len(errors) * pixels))),
            "ssim": float(similarities.mean()),
        }
        if self.extractor is None:
            return quality
        real, reconstructed = self._real_statistics(self.extractor), feature_statistics(features)
        name = f"r{metric_name('fd', self.extractor.name, self.num_images)}"
        return quality | {name: frechet_distance(reconstructed.mean, reconstructed.cov, real.mean, real.cov)}

    def _measure_batch(self, autoencoder: Any, rows: np.ndarray) -> BatchQuality:
        originals = torch.from_numpy(self.images.read(rows)).to(self.worker.device)
        decoded = reconstruct(autoencoder, originals)
        difference = originals.double() - decoded.double()
        return BatchQuality(
            difference.square().sum(dim=(1, 2, 3)).cpu().numpy(),
            structural_similarities(originals, decoded).cpu().numpy(),
            self._features(decoded),
        )

    def _features(self, images: Tensor) -> np.ndarray:
        if self.extractor is None:
            return np.zeros((len(images), 0), np.float32)
        return self.extractor(images.permute(0, 3, 1, 2)).features

    def _real_statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        """Return the statistics of the images themselves, which are measured once."""
        if self._real is None:
            own = [(self._features(torch.from_numpy(self.images.read(rows))),) for rows in self._own]
            self._real = feature_statistics(*self._gather(own))
        return self._real

    def _gather(self, measured: list[Any]) -> list[np.ndarray]:
        """Return what all workers have measured, each kind in the order of the images."""
        batches = [batch for of_worker in self.worker.gather(measured) for batch in of_worker]
        # The last batch is filled up with images that have been measured already.
        return [np.concatenate(parts)[: self.num_images] for parts in zip(*batches, strict=True)]


class AutoencoderValidation:
    """The `validate` of the training loop: measures reconstructions of held-out images by the averaged weights."""

    def __init__(self, quality: ReconstructionQuality, report: Callable[[int, dict[str, float]], object]):
        """report: is given the figures after a step."""
        self._quality, self._report = quality, report

    def __call__(self, state: TrainState) -> None:
        """Measure and report. Training continues as if nothing was measured. Collective."""
        autoencoder: Any = state.network.autoencoder
        was_training = state.network.training
        state.network.eval()
        with state.ema.swapped_into(state.network):
            measured = self._quality.measure(autoencoder)
        state.network.train(was_training)
        self._report(state.step, measured)


def feature_statistics(features: np.ndarray) -> FeatureStatistics:
    """Return the statistics of features (N, D)."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def reconstruct(autoencoder: Any, images: Tensor) -> Tensor:
    """Return images as an AutoencoderKL reconstructs them from the posterior's mean, uint8 (N, H, W, 3), on its device.

    images: uint8 (N, H, W, 3).
    """
    device, decoded = next(autoencoder.parameters()).device, []
    for part in images.split(measured_at_once(images.shape[1])):
        mean = autoencoder.encode(images_from_uint8(part.to(device))).latent_dist.mean
        decoded.append(images_to_uint8(autoencoder.decode(mean).sample))
    return torch.cat(decoded)
