"""Samples from a checkpoint: sample i is a function of (seed, i), whatever the batch and the worker."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dit.autoencoder import Autoencoder, LatentScale
from dit.config import config_from_dict
from dit.model import build_model
from dit.objective import create_process
from dit.samplers import SAMPLERS, guided, in_dtype
from dit.weights import load_weights
from evaluation.protocol import EvaluationProtocol, sample_label, sample_seed
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import open_checkpoint

START_NOISE, STEP_NOISE = 0, 1
"""Streams of a sample's random numbers."""


class Sampler:
    """A checkpoint ready to sample on one device."""

    def __init__(
        self,
        checkpoint: str | Path,
        protocol: EvaluationProtocol,
        *,
        batch_size: int,
        device: str = "cpu",
        compiled: bool = False,
        autoencoder: Path | None = None,
    ):
        """autoencoder: folder of the checkpoint's, where it is not at its usual place."""
        opened = open_checkpoint(checkpoint)
        self.protocol, self.batch_size, self.device = protocol, batch_size, device
        config = config_from_dict(opened.config["model"])
        weights = opened.weights("model" if protocol.weights == "raw" else protocol.weights, device)
        self.model = load_weights(build_model(config), weights).to(device).eval()
        if compiled:
            # Batches are of one size, with guidance of two: for each a graph of its own, for no other.
            self.model.compile(dynamic=False)
        self.num_classes = config.num_classes
        self.latent_shape = (config.in_channels, *config.latent_size)
        self.process = create_process(**opened.config["objective"])
        self.autoencoder = Autoencoder.load(autoencoder or checkpoint_autoencoder(opened), device)
        # The scale that the model was trained with, whatever the autoencoder's folder says today.
        recorded = opened.config["autoencoder"]
        self.autoencoder.scale = LatentScale(recorded["latents_mean"], recorded["latents_std"])

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Classes of samples, int64."""
        protocol = self.protocol
        return np.array(
            [sample_label(protocol.seed, index, self.num_classes, protocol.labels) for index in indices],
            np.int64,
        )

    def sample(self, indices: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """Images uint8 (N, H, W, 3) of samples; labels int64 (N,)."""
        return np.concatenate(
            [
                self._batch(indices[start : start + self.batch_size], labels[start : start + self.batch_size])
                for start in range(0, len(indices), self.batch_size)
            ]
        )

    def _batch(self, indices: Sequence[int], labels: np.ndarray) -> np.ndarray:
        count = len(indices)
        # Always a full batch, the rest repeated: kernels chosen by batch size would change the last bits.
        padded = np.resize(np.asarray(indices), self.batch_size)
        start = [_generator(self.protocol.seed, int(index), START_NOISE) for index in padded]
        steps = [_generator(self.protocol.seed, int(index), STEP_NOISE) for index in padded]
        protocol = self.protocol
        model = in_dtype(self.model, protocol.dtype)
        latents = SAMPLERS[protocol.sampler](
            guided(model, protocol.cfg_scale, protocol.cfg_channels, protocol.cfg_interval),
            self._normal(start),
            torch.from_numpy(np.resize(labels, self.batch_size)).to(self.device) if self.num_classes else None,
            process=self.process,
            steps=protocol.sampling_steps,
            step_noise=lambda i, x: self._normal(steps),
        )
        return self.autoencoder.decode(latents)[:count].cpu().numpy()

    def _normal(self, generators: list[torch.Generator]) -> torch.Tensor:
        """The next noise of every sample, (N, C, H, W)."""
        noise = [torch.randn(self.latent_shape, generator=generator) for generator in generators]
        return torch.stack(noise).to(self.device)


def _generator(seed: int, index: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(sample_seed(seed, index, stream))
