"""The train job's own loop, with the thread that prepares its batches; needs torch and pyarrow, not Ray or MLflow."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
from gpu_bench import PROCESS, Bench
from gpu_report import Figure
from gpu_training import Batch, measure_training, profile_training, training_figure

from dit.autoencoders.latent_scale import LatentScale
from dit.config import DiTConfig
from pipelines.latents.dataset import LatentArrays
from pipelines.training.data.batches import latent_batches, prefetch
from pipelines.training.data.order import EpochOrder, WorkerShare

NAME = "DiT-S/2"
IMAGES, ROWS = 256, 4096
PROFILED_STEPS = 20


class LatentsInMemory:
    """A LatentSource of random moments, of images and of their horizontal flips."""

    def __init__(self, config: DiTConfig, rows: int) -> None:
        random, channels = np.random.default_rng(0), config.in_channels
        self.latent_shape = (channels, *config.latent_size)
        self.moments_shape = (2 * channels, *config.latent_size)
        moments = random.standard_normal((rows, *self.moments_shape), dtype=np.float32).astype(np.float16)
        self._arrays = LatentArrays(random.integers(config.num_classes, size=rows), moments, moments[..., ::-1].copy())
        self.order = EpochOrder(rows, seed=0)

    def read(self, rows: np.ndarray, flip: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """Copy the moments of rows into `moments`, and return their labels."""
        self._arrays.copy_moments(rows, flip, moments)
        return self._arrays.labels[rows]

    def prefetch(self, position: int) -> None:
        """Do nothing: everything is in memory."""


def profile_job_loop(bench: Bench) -> Iterator[Figure]:
    """Train on batches that a thread prepares, as the train job does, and profile some of the steps."""
    config, size, product = bench.model(NAME), bench.size(IMAGES), bench.product()
    network = bench.network(NAME)
    bench.compile(network)
    batches = latent_batches(
        LatentsInMemory(config, bench.size(ROWS)),
        PROCESS,
        scale=LatentScale((0.0,) * config.in_channels, (1.0,) * config.in_channels),
        null_class=config.null_class,
        dropout=config.condition_dropout_prob,
        seed=0,
        share=WorkerShare(0, 1, size),
        first_batch=0,
        random="counter",
        device=bench.device,
    )
    what, window = f"job's loop {bench.label(NAME)}, batch {size}", 2 if bench.small else 20
    with closing(prefetch(batches)) as prefetched:
        given = (Batch(each.latents, each.t, each.conditions.labels, each.noise) for each in prefetched)
        measured = measure_training(network, given, PROCESS, bench.device, size=size, window=window, seconds=15)
        trained = f"training step, {what}, bfloat16, compiled by blocks"
        yield training_figure(trained, config, measured.images_per_second, product)
        if bench.device.type == "cpu":
            yield Figure(what=f"GPU busy, {what}", value=None, note="left out: no GPU")
            return
        yield profile_training(measured, f"GPU busy, {what}", bench.folder / "job_trace.json", PROFILED_STEPS)
