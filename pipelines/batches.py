"""Training batches: which images a step sees, and every random number it uses.

All of it is a function of (seed, step, position in the global batch): not of ranks, not of what came before.
Resuming therefore needs the step alone, and any number of workers sees the same images with the same noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dit.autoencoder import LatentScale, images_from_uint8, sample_posterior

if TYPE_CHECKING:
    from pipelines.latents import LatentArrays

SHUFFLE, DRAWS = 0, 1
"""Streams of random numbers that must not share a seed."""


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one worker computes."""

    rank: int
    num_workers: int
    global_batch_size: int

    def positions(self) -> range:
        """Positions of this worker's images in the global batch."""
        size = self.global_batch_size // self.num_workers
        return range(self.rank * size, (self.rank + 1) * size)


class EpochOrder:
    """Row of the data set at each place of the endless sequence of epochs, each epoch shuffled anew."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, places: range) -> np.ndarray:
        """Rows (int64) at consecutive places; an epoch's end may fall between them."""
        return np.array([self._row(place) for place in places], np.int64)

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, SHUFFLE, epoch)).permutation(self.num_rows)
        return self._order[offset]


def step_rows(order: EpochOrder, share: Share, step: int) -> np.ndarray:
    """Rows that this worker sees at `step`."""
    first = step * share.global_batch_size
    return order.rows(range(first + share.positions().start, first + share.positions().stop))


def generators(seed: int, share: Share, step: int) -> Iterator[torch.Generator]:
    """One generator for each of this worker's images at `step`. On the CPU, so that no device differs."""
    generator = torch.Generator()
    for position in share.positions():
        state = np.random.SeedSequence((seed, DRAWS, step, position)).generate_state(1, np.uint64)
        yield generator.manual_seed(int(state[0]))


@dataclass
class LatentBatch:
    """What one training step needs to know."""

    latents: Tensor
    """(n, C, H, W) float32, drawn from the posterior and scaled."""
    labels: Tensor
    """(n,) int64; dropped ones are the null class already."""
    t: Tensor
    """(n,) timesteps of the process."""
    noise: Tensor
    """(n, C, H, W) float32."""


def latent_batches(
    arrays: "LatentArrays",
    process,
    *,
    scale: LatentScale,
    null_class: int | None,
    dropout: float,
    seed: int,
    share: Share,
    first_step: int,
    device: torch.device | str = "cpu",
) -> Iterator[LatentBatch]:
    """Batches from `first_step` on, without end. Label dropout happens here and nowhere else."""
    order = EpochOrder(len(arrays.labels), seed)
    channels, height, width = arrays.moments.shape[1:]
    shape = (2, channels // 2, height, width)
    step = first_step
    while True:
        rows = step_rows(order, share, step)
        draws = [
            (torch.rand(3, generator=generator), torch.randn(shape, generator=generator))
            for generator in generators(seed, share, step)
        ]
        uniform = torch.stack([draw[0] for draw in draws])
        normal = torch.stack([draw[1] for draw in draws])
        moments = _moments(arrays, rows, mirrored=uniform[:, 0].numpy() < 0.5)
        labels = torch.from_numpy(arrays.labels[rows])
        if null_class is not None:
            labels = torch.where(uniform[:, 1] < dropout, null_class, labels)
        yield LatentBatch(
            latents=scale.scale(sample_posterior(moments, normal[:, 0])).to(device, non_blocking=True),
            labels=labels.to(device, non_blocking=True),
            t=process.sample_timesteps(uniform[:, 2]).to(device, non_blocking=True),
            noise=normal[:, 1].to(device, non_blocking=True),
        )
        step += 1


def _moments(arrays: "LatentArrays", rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
    moments = arrays.moments[rows]
    if arrays.moments_flip is not None:
        moments[mirrored] = arrays.moments_flip[rows[mirrored]]
    return torch.from_numpy(moments)


@dataclass
class ImageBatch:
    """What one step of autoencoder training needs."""

    images: Tensor
    """(n, 3, H, W) float32 in [-1, 1]."""
    noise: Tensor
    """(n, C, h, w) float32, for the posterior's draw."""


def image_batches(
    blocks: list[np.ndarray],
    *,
    latent_shape: tuple[int, int, int],
    seed: int,
    share: Share,
    first_step: int,
    device: torch.device | str = "cpu",
) -> Iterator[ImageBatch]:
    """Batches of uint8 images (N, H, W, 3) that lie in several blocks, from `first_step` on, without end."""
    starts = np.cumsum([0] + [len(block) for block in blocks])
    order = EpochOrder(int(starts[-1]), seed)
    step = first_step
    while True:
        rows = step_rows(order, share, step)
        places = zip(np.searchsorted(starts, rows, side="right") - 1, rows, strict=True)
        images = np.stack([blocks[block][row - starts[block]] for block, row in places])
        noise = [torch.randn(latent_shape, generator=generator) for generator in generators(seed, share, step)]
        yield ImageBatch(
            images=images_from_uint8(torch.from_numpy(images)).to(device, non_blocking=True),
            noise=torch.stack(noise).to(device, non_blocking=True),
        )
        step += 1
