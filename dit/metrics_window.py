"""Metrics of the training loop between two reports: their means, throughput, and the time spent waiting."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WindowTotals:
    """The state of a MetricsWindow in this process: what an interrupted training needs to report the same means."""

    sums: dict[str, float]
    tensors: list[str]
    """Names of the sums that are float32 tensors; the others are Python numbers."""
    steps: int
    seconds: float
    waited: float
    saved: float

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a JSON object."""
        return asdict(self)


class MetricsWindow:
    """Means of the metrics since the last report, throughput, and shares of time spent waiting.

    Throughput is in images per second over all workers. Training waits for data, and for checkpoints to be taken; the
    time of a checkpoint counts towards the next window, because it is taken after the report of its step.
    """

    def __init__(self, images_per_step: int, earlier: WindowTotals | None = None) -> None:
        """earlier: totals of an interrupted window, to continue with."""
        self.images_per_step = images_per_step
        self._restart()
        if earlier is not None:
            for name, value in earlier.sums.items():
                self.sums[name] = torch.tensor(value) if name in earlier.tensors else value
            self.steps, self.waited, self.saved = earlier.steps, earlier.waited, earlier.saved
            self.started -= earlier.seconds

    def _restart(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.steps = 0
        self.waited = self.saved = 0.0
        self.started = time.perf_counter()

    def time_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches, and add up the time that each takes to arrive."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - started
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside this context."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    @contextmanager
    def time_saving(self) -> Iterator[None]:
        """Add up the time that checkpoints delay training, which is the time inside this context."""
        started = time.perf_counter()
        yield
        self.saved += time.perf_counter() - started

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add the metrics of one step."""
        # Sums stay on the device, because reading a number at every step would make the GPU wait.
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def totals(self) -> WindowTotals:
        """Return what the window has added up so far."""
        return WindowTotals(
            sums={name: float(value) for name, value in self.sums.items()},
            tensors=[name for name, value in self.sums.items() if isinstance(value, Tensor)],
            steps=self.steps,
            seconds=time.perf_counter() - self.started,
            waited=self.waited,
            saved=self.saved,
        )

    def means(self) -> dict[str, float]:
        """Return the means of the window, and start a new one.

        They include images_per_second, data_wait and checkpoint_wait, the last two as shares of the elapsed time.
        """
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        means["images_per_second"] = self.images_per_step * self.steps / seconds
        means["data_wait"] = self.waited / seconds
        means["checkpoint_wait"] = self.saved / seconds
        self._restart()
        return means
