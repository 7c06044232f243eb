"""Training batches: what a step sees of the images in its order, and every random number it uses.

All of it is a function of (seed, step, position in the global batch): not of ranks, not of what came before.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit.autoencoder import LatentScale, images_from_uint8, sample_posterior
from pipelines.training.order import DRAWS, EpochOrder, Share, step_rows

if TYPE_CHECKING:
    from pipelines.training.loading import Latents

Batch = TypeVar("Batch")
CPU = torch.device("cpu")


def generators(seed: int, share: Share, step: int) -> Iterator[torch.Generator]:
    """One generator for each of this worker's images at `step`. On the CPU, so that no device differs."""
    generator = torch.Generator()
    for position in share.positions():
        state = np.random.SeedSequence((seed, DRAWS, step, position)).generate_state(1, np.uint64)
        yield generator.manual_seed(int(state[0]))


class MicroBatches:
    """A batch of tensors of which the first axis is the images."""

    def chunk(self, count: int) -> list[Self]:
        """The batch in at most `count` parts of nearly equal size."""
        tensors = [getattr(self, field.name).chunk(count) for field in fields(self)]  # type: ignore[arg-type]
        return [type(self)(*parts) for parts in zip(*tensors, strict=True)]


@dataclass
class LatentBatch(MicroBatches):
    """What one training step needs to know."""

    latents: Tensor
    """(n, C, H, W) float32, drawn from the posterior and scaled."""
    labels: Tensor
    """(n,) int64; dropped ones are the null class already."""
    t: Tensor
    """(n,) timesteps of the process."""
    noise: Tensor
    """(n, C, H, W) float32."""
    rows: Tensor
    """(n,) int64 on the CPU: which rows of the data set these are."""


def latent_batches(
    latents: "Latents",
    process,
    *,
    scale: LatentScale,
    null_class: int | None,
    dropout: float,
    seed: int,
    share: Share,
    first_batch: int,
    device: torch.device = CPU,
) -> Iterator[LatentBatch]:
    """Batches from number `first_batch` on, without end. Label dropout happens here and nowhere else."""
    shape = (2, *latents.latent_shape)
    for number in itertools.count(first_batch):
        latents.ahead(number * share.global_batch_size)
        rows = step_rows(latents.order, share, number)
        draws = [
            (torch.rand(3, generator=generator), torch.randn(shape, generator=generator))
            for generator in generators(seed, share, number)
        ]
        uniform = torch.stack([draw[0] for draw in draws])
        normal = torch.stack([draw[1] for draw in draws])
        labels, moments = map(torch.from_numpy, latents.read(rows, mirrored=uniform[:, 0].numpy() < 0.5))
        if null_class is not None:
            labels = torch.where(uniform[:, 1] < dropout, null_class, labels)
        yield LatentBatch(
            latents=to_device(scale.scale(sample_posterior(moments, normal[:, 0])), device),
            labels=to_device(labels, device),
            t=to_device(process.sample_timesteps(uniform[:, 2]), device),
            noise=to_device(normal[:, 1], device),
            rows=torch.from_numpy(rows),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU the copy runs beside what is computed there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def prefetched(batches: Iterable[Batch], depth: int = 2) -> Generator[Batch, None, None]:
    """The same batches, made by a thread while the one before is used."""
    iterator = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = deque(pool.submit(next, iterator, None) for _ in range(depth))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, iterator, None))
            yield batch


@dataclass
class ImageBatch(MicroBatches):
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
    first_batch: int,
    device: torch.device = CPU,
) -> Iterator[ImageBatch]:
    """Batches of uint8 images (N, H, W, 3) that lie in several blocks, from number `first_batch` on, without end."""
    starts = np.cumsum([0] + [len(block) for block in blocks])
    order = EpochOrder(int(starts[-1]), seed)
    for number in itertools.count(first_batch):
        rows = step_rows(order, share, number)
        places = zip(np.searchsorted(starts, rows, side="right") - 1, rows, strict=True)
        images = np.stack([blocks[block][row - starts[block]] for block, row in places])
        noise = [torch.randn(latent_shape, generator=generator) for generator in generators(seed, share, number)]
        yield ImageBatch(
            images=to_device(images_from_uint8(torch.from_numpy(images)), device),
            noise=to_device(torch.stack(noise), device),
        )
