"""Training batches: the images of a step, and every random number that the step uses.

A batch is a function of (seed, batch number, position in the global batch). It depends neither on the number of workers
nor on the batches before it.
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
from dit.conditions import Conditions
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from pipelines.training.order import DRAW_STREAM, EpochOrder, WorkerShare, batch_rows

if TYPE_CHECKING:
    from pipelines.training.loading import LatentSource

Batch = TypeVar("Batch")
OnDevice = TypeVar("OnDevice", Tensor, Conditions)
Process = GaussianDiffusion | FlowMatching
CPU = torch.device("cpu")


def image_generators(seed: int, share: WorkerShare, number: int) -> Iterator[torch.Generator]:
    """Yield a generator for each image of a worker's share of a batch; on the CPU, so that no device differs.

    It is one object, seeded again for each image: use it before asking for the next.
    """
    generator = torch.Generator()
    for position in share.positions():
        state = np.random.SeedSequence((seed, DRAW_STREAM, number, position)).generate_state(1, np.uint64)
        yield generator.manual_seed(int(state[0]))


class TensorBatch:
    """Base of batches: dataclasses of tensors, whose first axis is the image, and conditions."""

    def chunk(self, count: int) -> list[Self]:
        """Split the batch into at most `count` micro-batches of nearly equal size."""
        tensors = [getattr(self, field.name).chunk(count) for field in fields(self)]  # type: ignore[arg-type]
        return [type(self)(*chunks) for chunks in zip(*tensors, strict=True)]


@dataclass
class LatentBatch(TensorBatch):
    """The inputs of one step of diffusion training."""

    latents: Tensor
    """(n, C, H, W) float32, drawn from the posterior and scaled."""
    conditions: Conditions
    """Of n images; dropped ones have been replaced by the null class."""
    t: Tensor
    """(n,) timesteps of the process."""
    noise: Tensor
    """(n, C, H, W) float32."""
    rows: Tensor
    """(n,) int64 on the CPU: the rows of the data set that the images come from."""


def latent_batches(
    source: "LatentSource",
    process: Process,
    *,
    scale: LatentScale,
    null_class: int | None,
    dropout: float,
    seed: int,
    share: WorkerShare,
    first_batch: int,
    device: torch.device = CPU,
) -> Iterator[LatentBatch]:
    """Yield a worker's share of all batches from number `first_batch` on, endlessly.

    dropout: probability of replacing an image's conditions by null_class. They are dropped here and nowhere else.
    """
    shape = (2, *source.latent_shape)
    for number in itertools.count(first_batch):
        source.prefetch(number * share.global_batch_size)
        rows = batch_rows(source.order, share, number)
        draws = [
            (torch.rand(3, generator=generator), torch.randn(shape, generator=generator))
            for generator in image_generators(seed, share, number)
        ]
        uniform = torch.stack([draw[0] for draw in draws])
        normal = torch.stack([draw[1] for draw in draws])
        labels, moments = map(torch.from_numpy, source.read(rows, flip=uniform[:, 0].numpy() < 0.5))
        conditions = Conditions(labels)
        if null_class is not None:
            conditions = conditions.drop(uniform[:, 1] < dropout, conditions.null(null_class=null_class))
        yield LatentBatch(
            latents=to_device(scale.scale(sample_posterior(moments, normal[:, 0])), device),
            conditions=to_device(conditions, device),
            t=to_device(process.sample_timesteps(uniform[:, 2]), device),
            noise=to_device(normal[:, 1], device),
            rows=torch.from_numpy(rows),
        )


def to_device(value: OnDevice, device: torch.device) -> OnDevice:
    """Copy a tensor or conditions to a device; to a GPU asynchronously, from pinned memory."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value


def prefetch(batches: Iterable[Batch], depth: int = 2) -> Generator[Batch, None, None]:
    """Yield the same batches, of which a thread prepares up to `depth` in advance."""
    iterator = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = deque(pool.submit(next, iterator, None) for _ in range(depth))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, iterator, None))
            yield batch


@dataclass
class ImageBatch(TensorBatch):
    """The inputs of one step of autoencoder training."""

    images: Tensor
    """(n, 3, H, W) float32 in [-1, 1]."""
    noise: Tensor
    """(n, C, h, w) float32, for the draw from the posterior."""


def image_batches(
    blocks: list[np.ndarray],
    *,
    latent_shape: tuple[int, int, int],
    seed: int,
    share: WorkerShare,
    first_batch: int,
    device: torch.device = CPU,
) -> Iterator[ImageBatch]:
    """Yield a worker's share of all batches from number `first_batch` on, endlessly.

    blocks: the images, uint8 arrays (N, H, W, 3). latent_shape: (C, h, w).
    """
    starts = np.cumsum([0] + [len(block) for block in blocks])
    order = EpochOrder(int(starts[-1]), seed)
    for number in itertools.count(first_batch):
        rows = batch_rows(order, share, number)
        block_numbers = np.searchsorted(starts, rows, side="right") - 1
        images = np.stack([blocks[block][row - starts[block]] for block, row in zip(block_numbers, rows, strict=True)])
        noise = [torch.randn(latent_shape, generator=generator) for generator in image_generators(seed, share, number)]
        yield ImageBatch(
            images=to_device(images_from_uint8(torch.from_numpy(images)), device),
            noise=to_device(torch.stack(noise), device),
        )
