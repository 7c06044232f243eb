"""Training batches: the images of a step, and every random number that the step uses.

A batch is a function of (seed, batch number, position in the global batch). It depends neither on the number of workers
nor on the batches before it.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit.autoencoder import LatentScale, images_from_uint8, sample_posterior
from dit.conditions import Conditions
from dit.config import RandomKind
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from pipelines.training.data.draws import BatchDraws
from pipelines.training.data.order import EpochOrder, WorkerShare, batch_rows

if TYPE_CHECKING:
    from pipelines.training.data.image_files import ImageRows
    from pipelines.training.data.loading import LatentSource

Batch = TypeVar("Batch")
OnDevice = TypeVar("OnDevice", Tensor, Conditions)
Process = GaussianDiffusion | FlowMatching
CPU = torch.device("cpu")


class TensorBatch:
    """Base of batches: dataclasses of tensors, whose first axis is the image, and conditions."""

    def chunk(self, count: int) -> list[Self]:
        """Split the batch into `count` micro-batches of nearly equal size; every worker must use the same count."""
        parts = [getattr(self, field.name).tensor_split(count) for field in fields(self)]  # type: ignore[arg-type]
        return [type(self)(*each) for each in zip(*parts, strict=True)]


@dataclass
class LatentBatch(TensorBatch):
    """The inputs of one step of diffusion training."""

    latents: Tensor
    """(n, C, H, W) float32, drawn from the posterior and scaled."""
    conditions: Conditions
    """Conditions of the n images; dropped labels have been replaced by the null class."""
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
    random: RandomKind | None = None,
    device: torch.device = CPU,
) -> Iterator[LatentBatch]:
    """Yield a worker's share of all batches from number `first_batch` on, endlessly.

    dropout: probability of replacing an image's conditions by null_class. They are dropped here and nowhere else.
    random: how random numbers are drawn (`pipelines.training.data.draws`).
    """
    draws = BatchDraws(seed, share, random, device)
    for number in itertools.count(first_batch):
        source.prefetch(number * share.global_batch_size)
        rows = batch_rows(source.order, share, number)
        (flip, drop, time), (posterior_noise, noise) = draws.for_latents(number, source.latent_shape)
        moments = empty_moments(len(rows), source.moments_shape, posterior_noise.device)
        labels = source.read(rows, flip.numpy() < 0.5, moments.numpy())
        conditions = Conditions(torch.from_numpy(labels))
        if null_class is not None:
            conditions = conditions.drop(drop < dropout, conditions.null(null_class=null_class))
        # Computed where the noise was drawn: by a counter on the device, and else on the CPU.
        latents = scale.scale(sample_posterior(to_device(moments, posterior_noise.device), posterior_noise))
        yield LatentBatch(
            latents=to_device(latents, device),
            conditions=to_device(conditions, device),
            t=to_device(process.sample_timesteps(time), device),
            noise=to_device(noise, device),
            rows=torch.from_numpy(rows),
        )


def empty_moments(count: int, moments_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return memory of the host for the moments of some images, float16 (n, *moments_shape).

    It is pinned where they go to a GPU, so that it needs no copy before the transfer. torch keeps pinned memory, and
    gives it out again once the GPU has read it.
    """
    return torch.empty((count, *moments_shape), dtype=torch.float16, pin_memory=device.type == "cuda")


def to_device(value: OnDevice, device: torch.device) -> OnDevice:
    """Copy a tensor or conditions to a device; to a GPU asynchronously, from pinned memory (its own, if it is)."""
    if device.type != "cuda" or (isinstance(value, Tensor) and value.is_cuda):
        return value
    return value.pin_memory().to(device, non_blocking=True)


def prefetch(batches: Iterable[Batch], depth: int = 2, *, threads: int = 1) -> Generator[Batch, None, None]:
    """Yield the same batches, of which a thread prepares up to `depth` in advance.

    threads: that its torch operations use. OpenMP keeps a team of threads for every thread that calls torch; where the
    teams hold more threads than there are cores, libgomp sleeps instead of spinning between operations: the steps of
    a small model then take nearly twice as long.
    """
    iterator = iter(batches)
    torch.get_num_threads()  # A thread's first operation takes the number that was set last, by any thread.
    with ThreadPoolExecutor(1, "batches", torch.set_num_threads, (threads,)) as pool:
        ahead = deque(pool.submit(next, iterator, None) for _ in range(depth))
        if torch.cuda.is_initialized():
            # So does autograd's thread of a GPU, in which code that is compiled for another number is compiled again.
            wait([ahead[0]])
            torch.set_num_threads(torch.get_num_threads())
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
    numbers: Tensor
    """(n,) int64 on the CPU: the number of the batch."""


def image_batches(
    images: "ImageRows",
    *,
    latent_shape: tuple[int, int, int],
    seed: int,
    share: WorkerShare,
    first_batch: int,
    random: RandomKind | None = None,
    crop: int | None = None,
    device: torch.device = CPU,
) -> Iterator[ImageBatch]:
    """Yield a worker's share of all batches from number `first_batch` on, endlessly.

    latent_shape: (C, h, w). random: as for `latent_batches`. crop: side of random crops; None: whole images.
    """
    order, draws = EpochOrder(len(images), seed), BatchDraws(seed, share, random, device)
    for number in itertools.count(first_batch):
        read = images.read(batch_rows(order, share, number))
        if crop is not None:
            read = random_crops(read, crop, draws.for_crops(number))
        yield ImageBatch(
            images=images_from_uint8(to_device(torch.from_numpy(read), device)),
            noise=to_device(draws.for_images(number, latent_shape), device),
            numbers=torch.full((len(read),), number),
        )


def random_crops(images: np.ndarray, side: int, u: Tensor) -> np.ndarray:
    """Return a square crop of each image. images: uint8 (n, H, W, 3). side: in pixels. u: uniform (n, 2), in (0, 1).

    All positions at which a crop lies inside of its image are equally likely.
    """
    room = torch.tensor([length - side + 1 for length in images.shape[1:3]])
    corners = (u * room).long().tolist()
    crops = [image[top : top + side, left : left + side] for image, (top, left) in zip(images, corners, strict=True)]
    return np.stack(crops)
