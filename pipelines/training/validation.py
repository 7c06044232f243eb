"""The validation loss: the training's loss on held-out latents, at noise and timesteps that never change.

Those of an image are a function of (seed, key). Images are computed in batches that are the same for any number of
workers, and their losses are added up in the order of the data set, so that the loss is the same, to the bit, on any
number of workers and after any interruption.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dit.autoencoder import sample_posterior
from dit.conditions import Conditions
from dit.distributed import reshard
from dit.random import Stream, normal, uniform
from dit.train import TrainState
from pipelines.config.training import VALIDATION_BATCH
from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset
from pipelines.training.data.batches import Process, empty_moments, to_device
from pipelines.training.data.loading import open_arrays
from pipelines.training.group.worker import Worker
from pipelines.training.losses import image_losses, last_timestep
from pipelines.training.metrics import mean_losses
from pipelines.training.settings import TrainWorkerSettings

NOISES = (Stream.VALIDATION_POSTERIOR_NOISE, Stream.VALIDATION_NOISE)


class Validation:
    """The `validate` of the training loop: measures the loss of held-out latents, each worker a part of them."""

    def __init__(
        self,
        settings: TrainWorkerSettings,
        process: Process,
        worker: Worker,
        report: Callable[[int, dict[str, float]], object],
    ):
        """Open the held-out latents. report: is given the losses after a step."""
        self._settings, self._process, self._worker, self._report = settings, process, worker, report
        assert settings.held_out is not None, "only a recipe with held-out latents validates"
        dataset = settings.held_out.open()
        self._arrays, self._latent_shape = open_arrays(dataset), dataset.latent_shape
        self._moments_shape = dataset.moments_shape
        self._positions = key_positions(dataset)

    def __call__(self, state: TrainState) -> None:
        """Measure and report the losses. Collective."""
        measured = self.measure(state)
        finite = {name: value for name, value in measured.items() if math.isfinite(value)}
        if len(finite) < len(measured):
            self._worker.notice(f"step {state.step:,}: {len(measured) - len(finite)} validation losses are not finite")
        self._report(state.step, finite)

    def measure(self, state: TrainState) -> dict[str, float]:
        """Return the mean losses, of all images and by quarters of the timesteps, for the averaged and the raw weights.

        They are "loss", "loss_quartile_1" and so on for the averaged weights, which sampling uses by default, and
        "raw_loss" and so on for the trained ones. Training continues as if nothing was measured. Collective.
        """
        was_training = state.network.training
        state.network.eval()
        with state.ema.swapped_into(state.network):
            averaged = self._mean_losses(state.network)
        raw = self._mean_losses(state.network)
        state.network.train(was_training)
        return averaged | {f"raw_{name}": value for name, value in raw.items()}

    def _mean_losses(self, network: nn.Module) -> dict[str, float]:
        batches = held_out_batches(len(self._positions))
        # As many passes in every worker, because those of sharded weights are collective; what is over is dropped.
        passes = -(-len(batches) // self._worker.num_workers)
        first = self._worker.rank * passes
        measured: list[tuple[Tensor, Tensor]] = []
        for number in range(first, first + passes):
            losses_and_times = self._losses(network, batches[min(number, len(batches) - 1)])
            if number < len(batches):
                measured.append(losses_and_times)
        # Not before all passes are queued: a copy from a GPU waits for it.
        own = [(loss.cpu().numpy(), t.cpu().numpy()) for loss, t in measured]
        reshard(network)
        parts = [part for of_worker in self._worker.gather(own) for part in of_worker]
        losses, times = (np.concatenate(arrays)[: len(self._positions)] for arrays in zip(*parts, strict=True))
        return mean_losses(losses, times, last_timestep(self._process))

    @torch.no_grad()
    def _losses(self, network: nn.Module, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the loss and the timestep of the images at some rows, each (n,)."""
        settings, device = self._settings, self._worker.device
        positions = self._positions[rows]
        on_device = to_device(positions, device)
        posterior_noise, noise = normal(settings.seed, NOISES, 0, on_device, self._latent_shape, device)
        u = uniform(settings.seed, Stream.VALIDATION_TIMESTEP, 0, positions, ())
        moments = empty_moments(len(rows), self._moments_shape, device)
        self._arrays.copy_moments(rows, np.zeros(len(rows), bool), moments.numpy())
        latents = settings.scale.scale(sample_posterior(to_device(moments, device), posterior_noise))
        conditions = to_device(Conditions(torch.from_numpy(self._arrays.labels[rows])), device)
        t = to_device(self._process.sample_timesteps(u), device)
        losses = image_losses(network, self._process, settings.train.dtype, latents, t, conditions, noise)
        return losses["loss"], t


def key_positions(dataset: LatentDataset) -> Tensor:
    """Return the position of each image among random draws, int64 (N,): the little-endian BLAKE2b-32 of its key."""
    keys = (key for table in dataset.tables([schema.KEY]) for key in table.column(schema.KEY).to_pylist())
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=4).digest() for key in keys)
    return torch.from_numpy(np.frombuffer(digests, "<u4").astype(np.int64))


def held_out_batches(num_images: int, most: int = VALIDATION_BATCH) -> list[np.ndarray]:
    """Return the rows of every batch. All have one size: the last is filled up with rows from the start.

    most: images of a batch.
    """
    size = min(most, num_images)
    return [np.arange(start, start + size) % num_images for start in range(0, num_images, size)]
