"""The random numbers of a training batch, as a function of (seed, batch number, position in the global batch).

Either way of drawing gives the same numbers for any number of workers. `dit.random` draws for all images at once, on
the device that computes; a generator for each image, as in releases before it, draws on the CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dit.config import RandomKind
from dit.random import Stream, normal, uniform
from pipelines.training.data.order import DRAW_STREAM, WorkerShare

UNIFORM_STREAMS = (Stream.FLIP, Stream.CONDITION_DROPOUT, Stream.TIMESTEP)
UNIFORMS_AT_ONCE = 4096
"""Images whose uniform numbers are drawn by a counter at once, in as many batches as that takes.

Drawing takes about a hundred operations of NumPy, however few the numbers, and they release the interpreter only where
arrays are long.
"""


@dataclass(frozen=True)
class BatchDraws:
    """Draws the random numbers of a worker's share of every batch."""

    seed: int
    share: WorkerShare
    random: RandomKind | None
    """How: "counter" by `dit.random`, None by a generator for each image."""
    device: torch.device
    """Device of normal numbers drawn by "counter"; all others are on the CPU."""
    _uniforms: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Uniform numbers drawn by "counter" of some batches, (3, n) each, by their numbers."""

    def for_latents(self, number: int, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return what diffusion training needs of a batch: uniform (3, n) on the CPU, and normal (2, n, *latent_shape).

        Uniform numbers decide on flip and condition dropout, and give the timestep; normal ones are the draw from the
        posterior, and the noise.
        """
        if self.random == "counter":
            noises = (Stream.POSTERIOR_NOISE, Stream.NOISE)
            normals = normal(self.seed, noises, number, self._positions(self.device), latent_shape, self.device)
            return self._draw_uniforms(number), normals
        draws = [
            (torch.rand(3, generator=generator), torch.randn((2, *latent_shape), generator=generator))
            for generator in self._generators(number)
        ]
        uniforms, normals = (torch.stack([draw[part] for draw in draws], dim=1) for part in (0, 1))
        return uniforms, normals

    def for_images(self, number: int, latent_shape: tuple[int, ...]) -> Tensor:
        """Return the normal noise that autoencoder training needs of a batch, (n, *latent_shape)."""
        if self.random == "counter":
            stream = Stream.AUTOENCODER_NOISE
            return normal(self.seed, stream, number, self._positions(self.device), latent_shape, self.device)
        return torch.stack([torch.randn(latent_shape, generator=each) for each in self._generators(number)])

    def _draw_uniforms(self, number: int) -> Tensor:
        if number not in self._uniforms:
            positions = self._positions()
            numbers = range(number, number + max(1, UNIFORMS_AT_ONCE // max(1, len(positions))))
            drawn = uniform(self.seed, UNIFORM_STREAMS, numbers, positions, ()).unbind(1)
            self._uniforms.clear()
            self._uniforms.update(zip(numbers, drawn, strict=True))
        return self._uniforms[number]

    def for_crops(self, number: int) -> Tensor:
        """Return uniform numbers (n, 2) for the sides of random crops, by a counter however others are drawn."""
        return uniform(self.seed, Stream.AUTOENCODER_CROP, number, self._positions(), (2,))

    def _positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the positions of the worker's images in a batch, (n,), made on the device, which spares a copy."""
        positions = self.share.positions()
        return torch.arange(positions.start, positions.stop, device=device)

    def _generators(self, number: int) -> Iterator[torch.Generator]:
        """Yield a generator for each image of a batch; on the CPU, so that no device differs.

        It is one object, seeded again for each image: use it before asking for the next.
        """
        generator = torch.Generator()
        for position in self.share.positions():
            state = np.random.SeedSequence((self.seed, DRAW_STREAM, number, position)).generate_state(1, np.uint64)
            yield generator.manual_seed(int(state[0]))
