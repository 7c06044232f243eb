"""The noise of samples, as a function of (seed, index), whatever the batch and the worker."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dit.random import Stream, normal
from evaluation.protocol import EvaluationProtocol, sample_seed

START_NOISE, STEP_NOISE = 0, 1
"""Streams of sample_seed: the noise that a sample starts from, and the noise of the sampler's steps."""


class SampleNoise(Protocol):
    """The noise of a batch of samples; each draw is (N, C, H, W) on the device that samples."""

    def start(self) -> Tensor:
        """Return the noise that samples start from."""
        ...

    def step(self, number: int, x: Tensor) -> Tensor:
        """Return the noise of a sampler's step, as `step_noise` of `dit.samplers`. Steps must be in order."""
        ...


def sample_noise(
    protocol: EvaluationProtocol, indices: np.ndarray, latent_shape: tuple[int, int, int], device: torch.device | str
) -> SampleNoise:
    """Return the noise of the samples with the given indices, int64 (N,), as the protocol draws it."""
    kind = CounterNoise if protocol.random == "counter" else GeneratorNoise
    return kind(protocol.seed, indices, latent_shape, device)


class CounterNoise:
    """Noise by `dit.random`, for the whole batch on its device."""

    def __init__(self, seed: int, indices: np.ndarray, latent_shape: tuple[int, ...], device: torch.device | str):
        self.seed, self.latent_shape, self.device = seed, latent_shape, device
        self.indices = torch.from_numpy(indices).to(device)

    def start(self) -> Tensor:
        return normal(self.seed, Stream.START_NOISE, 0, self.indices, self.latent_shape, self.device)

    def step(self, number: int, x: Tensor) -> Tensor:
        return normal(self.seed, Stream.STEP_NOISE, number, self.indices, self.latent_shape, self.device)


class GeneratorNoise:
    """Noise by a generator on the CPU for each sample and stream, as in releases before `dit.random`."""

    def __init__(self, seed: int, indices: np.ndarray, latent_shape: tuple[int, ...], device: torch.device | str):
        self.latent_shape, self.device = latent_shape, device
        self._starts, self._steps = (
            [torch.Generator().manual_seed(sample_seed(seed, int(index), stream)) for index in indices]
            for stream in (START_NOISE, STEP_NOISE)
        )

    def start(self) -> Tensor:
        return self._draw(self._starts)

    def step(self, number: int, x: Tensor) -> Tensor:
        return self._draw(self._steps)

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        if torch.device(self.device).type == "cuda":
            noise = noise.pin_memory()  # so that the copy waits for no step that is queued on the GPU
        return noise.to(self.device, non_blocking=True)
