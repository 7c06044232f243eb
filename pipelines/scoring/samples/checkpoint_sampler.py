"""Samples from a checkpoint: sample i is a function of (seed, i), whatever the batch size and the worker."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dit.autoencoder import Autoencoder, images_from_uint8
from dit.compilation import compile_network
from dit.conditions import Conditions
from dit.formats.weights import check_weights, load_weights
from dit.model import build_uninitialized, meta_state
from dit.objective import create_process
from dit.precision import in_dtype, network_precision
from dit.sampler_names import SAMPLER_PROCESSES
from dit.samplers import SAMPLERS, guided
from evaluation.protocol import EvaluationProtocol, sample_label
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import LocatedCheckpoint, SharedCheckpoint, open_checkpoint
from pipelines.scoring.samples.noise import sample_noise
from pipelines.scoring.samples.precision import require_sampling_precision
from raydit.errors import InvalidInput


class CheckpointSampler:
    """A checkpoint's model and autoencoder on one device, ready to sample by a protocol."""

    def __init__(
        self,
        checkpoint: str | Path | SharedCheckpoint,
        protocol: EvaluationProtocol,
        *,
        batch_size: int,
        device: str = "cpu",
        compiled: bool = False,
        autoencoder: Path | None = None,
        guide: str | Path | SharedCheckpoint | None = None,
    ):
        """Load a checkpoint; autoencoder: its autoencoder's folder, if that is not where the checkpoint expects it.

        guide: the checkpoint that guides, if the protocol has autoguidance (`pipelines.scoring.samples.guide` checks
        that it fits). Raises InvalidInput if the device lacks a precision of the protocol, or there is no such guide.
        """
        require_sampling_precision(protocol, device)
        opened = open_checkpoint(checkpoint)
        self.name = opened.origin
        self.protocol, self.batch_size, self.device = protocol, batch_size, device
        config = opened.record.model_config
        self.model = _load_model(opened, protocol.weights, device, compiled)
        self.guide: nn.Module | None = None
        if protocol.autoguidance is not None:
            if guide is None:
                found = f"no checkpoint for the autoguidance of protocol {protocol.label}"
                raise InvalidInput(found, "the one that guides", "give it as `guide`")
            weights = protocol.autoguidance_weights or protocol.weights
            self.guide = _load_model(open_checkpoint(guide), weights, device, compiled)
        self.num_classes = config.num_classes
        self.latent_shape = (config.in_channels, *config.latent_size)
        self.process = create_process(**opened.record.objective)
        self.autoencoder = Autoencoder.load(autoencoder or checkpoint_autoencoder(opened), device)
        # The scale that the model was trained with, whatever the autoencoder's folder records today.
        self.autoencoder.scale = opened.record.autoencoder.scale

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Return the class labels of samples, int64 (N,), as the protocol draws them."""
        seed, mode = self.protocol.seed, self.protocol.labels
        return np.array([sample_label(seed, index, self.num_classes, mode) for index in indices], np.int64)

    def sample(self, indices: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """Sample images, uint8 (N, H, W, 3). indices: of the N samples. labels: their classes, int64 (N,).

        Raises InvalidInput if a sample is not finite.
        """
        return np.concatenate(
            [
                self._sample_batch(indices[start : start + self.batch_size], labels[start : start + self.batch_size])
                for start in range(0, len(indices), self.batch_size)
            ]
        )

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encode and decode images uint8 (N, H, W, 3) by the checkpoint's autoencoder, at the posterior's mean."""
        decoded = []
        for start in range(0, len(images), self.batch_size):
            batch = torch.from_numpy(images[start : start + self.batch_size].copy()).to(self.device)
            mean = self.autoencoder.encode(images_from_uint8(batch))[:, : self.autoencoder.latent_channels]
            decoded.append(self.autoencoder.decode(self.autoencoder.scale.scale(mean)).cpu().numpy())
        return np.concatenate(decoded)

    def _sample_batch(self, indices: Sequence[int], labels: np.ndarray) -> np.ndarray:
        count = len(indices)
        # Always a full batch, padded by repetition: kernels chosen by batch size would change the last bits.
        padded = np.resize(np.asarray(indices), self.batch_size)
        protocol = self.protocol
        noise = sample_noise(protocol, padded, self.latent_shape, self.device)
        model = in_dtype(self.model, protocol.dtype)
        guide = None if self.guide is None else in_dtype(self.guide, protocol.dtype)
        latents = SAMPLERS[protocol.sampler](
            guided(model, protocol.cfg_scale, protocol.cfg_channels, protocol.cfg_interval, guide=guide),
            noise.start(),
            self._conditions(np.resize(labels, self.batch_size)),
            process=self.process,
            steps=protocol.sampling_steps,
            step_noise=noise.step,
            **_sampler_options(protocol),
        )
        finite = torch.isfinite(latents[:count]).flatten(1).all(dim=1).cpu().numpy()
        if not finite.all():
            raise InvalidInput(
                f"{self.name}: sample {indices[int(np.argmin(finite))]} is NaN or infinite, and "
                f"{count - finite.sum()} of {count} samples of its batch",
                "finite samples",
                "choose another checkpoint; or, if its training is sound, more sampling_steps or dtype float32",
            )
        with network_precision(self.device, protocol.decoder_dtype or "float32"):
            return self.autoencoder.decode(latents)[:count].cpu().numpy()

    def _conditions(self, labels: np.ndarray) -> Conditions:
        """Return the conditions of samples on the device. labels: their classes, int64 (N,)."""
        return Conditions(torch.from_numpy(labels).to(self.device) if self.num_classes else None)


def _load_model(opened: LocatedCheckpoint, name: str, device: str, compiled: bool) -> nn.Module:
    """Return a checkpoint's network with the weights of that name, ready to sample on a device."""
    config, weights = opened.record.model_config, opened.weights(name, device)
    check_weights(meta_state(config), weights)  # before memory is taken for what the configuration claims
    model = load_weights(build_uninitialized(config).to(device), weights).eval()
    if compiled:
        # All batches have one size, and twice that with guidance: compiled at most twice.
        compile_network(model)
    return model


def _sampler_options(protocol: EvaluationProtocol) -> dict[str, Any]:
    """Return the arguments that the protocol's sampler takes beyond those of all samplers: only what is set."""
    names = {"time_shift": "time_shift"} if "flow" in SAMPLER_PROCESSES[protocol.sampler] else {}
    if protocol.sampler == "sde":
        names |= {"sde_diffusion": "diffusion", "sde_norm": "norm"}
    return {argument: value for name, argument in names.items() if (value := getattr(protocol, name)) is not None}
