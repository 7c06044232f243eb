"""Training steps of `dit.train`'s own loop, measured and profiled; needs only torch."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_report import Figure, busy_share, kind_of, read_trace
from torch import Tensor

from dit.config import DiTConfig
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.macs import forward_macs
from dit.precision import backward_in, network_precision
from dit.schedule import TrainingConfig
from dit.train import TrainState, create_state, train

Process = GaussianDiffusion | FlowMatching

NUM_WINDOWS = 6
PROFILED_STEPS = 4


def training_figure(
    what: str,
    config: DiTConfig,
    images_per_second: float,
    product: float,
    *,
    target: float | None = None,
    details: dict[str, float] | None = None,
) -> Figure:
    """Return the figure of a training's speed: three forward passes' FLOPs per image, as a share of the product."""
    share = 6 * forward_macs(config) * images_per_second / product
    return Figure(
        what=what,
        value=images_per_second,
        unit="images/s",
        product=product,
        share=share,
        target=target,
        details=details or {},
    )


@dataclass(frozen=True)
class Batch:
    """A batch of clean latents; a step adds the noise, as in training."""

    latents: Tensor
    t: Tensor
    labels: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in (self.latents, self.t, self.labels, self.noise)))


@dataclass(frozen=True)
class Measured:
    """A training that can go on, and its speed."""

    state: TrainState
    batches: Iterator[Batch]
    """The batches that follow."""
    size: int
    """Images of a batch."""
    process: Process
    device: torch.device
    dtype: str
    images_per_second: float
    first_seconds: float
    """Seconds until the second step could begin: compilation, and the first use of libraries."""
    gib: float
    """Peak memory of the device."""


def batch_of(config: DiTConfig, size: int, process: Process) -> Batch:
    """Return a random batch on the CPU; the seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, config.in_channels, *config.latent_size)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    is_flow = isinstance(process, FlowMatching)
    t = torch.rand(size, generator=generator) if is_flow else torch.randint(0, 1000, (size,), generator=generator)
    return Batch(latents, t, torch.randint(0, config.num_classes, (size,), generator=generator), noise)


def unchanged(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network itself: the module to call in training where nothing wraps it."""
    return network


def measure_training(
    network: torch.nn.Module,
    batches: Iterator[Batch],
    process: Process,
    device: torch.device,
    *,
    size: int,
    window: int,
    seconds: float,
    dtype: str = "bfloat16",
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = unchanged,
) -> Measured:
    """Train for NUM_WINDOWS reports of `window` steps each, or until the first report after the seconds are over.

    batches: endless, of `size` images each. wrap: returns the module to call, given the network.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = _config(size, steps=NUM_WINDOWS * window, log_every=window)
    state, speeds, begun = create_state(network, config, wrap), [], []
    deadline = time.perf_counter() + seconds

    def timed_batches() -> Iterator[Batch]:
        while True:
            begun.append(time.perf_counter())
            yield next(batches)

    _train(
        state,
        timed_batches(),
        process,
        config,
        device,
        dtype,
        report=speeds.append,
        stop=lambda: bool(speeds) and time.perf_counter() > deadline,  # without a report there is no speed
    )
    # The first window includes compilation; if it is the only one, the speed is a lower bound.
    speed = statistics.median(metrics["images_per_second"] for metrics in speeds[1:] or speeds)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return Measured(state, batches, size, process, device, dtype, speed, begun[1] - begun[0], gib)


def profile_training(measured: Measured, what: str, trace: Path, steps: int = PROFILED_STEPS) -> Figure:
    """Continue a training under torch's profiler, and return the share of time that the GPU was busy.

    Details of the figure are the largest gaps, and the shares of kinds of work. Only the GPU's side is recorded:
    recording the host's would delay its launches.
    """
    from torch.profiler import ProfilerActivity, profile

    state, device = measured.state, measured.device
    config = _config(measured.size, steps=state.step + steps, log_every=10**9)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _train(state, measured.batches, measured.process, config, device, measured.dtype)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    events = read_trace(trace)
    busy, gaps = busy_share((event["ts"], event["ts"] + event["dur"]) for event in events)
    total, sums = sum(event["dur"] for event in events), {}
    for event in events:
        sums[kind_of(event["name"])] = sums.get(kind_of(event["name"]), 0.0) + event["dur"]
    kinds = {name: f"{sums[name] / total:.0%}" for name in sorted(sums, key=sums.__getitem__, reverse=True)}
    details = {"largest gaps in ms": [round(gap / 1e3, 2) for gap in gaps], **kinds}
    return Figure(what=what, value=busy, unit="of the time", target=0.99, details=details)


def train_steps(
    network: torch.nn.Module, batch: Batch, process: Process, device: torch.device, steps: int
) -> list[float]:
    """Train a few steps in float32, and return the loss of each."""
    config = _config(len(batch.latents), steps=steps, log_every=1)
    reports = []
    state = create_state(network, config)
    _train(state, itertools.repeat(batch), process, config, device, "float32", report=reports.append)
    return [metrics["loss"] for metrics in reports]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())


def _config(size: int, *, steps: int, log_every: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, global_batch_size=size, log_every=log_every)


def _train(state, batches, process, config, device, dtype, *, report=lambda metrics: None, stop=lambda: False) -> None:
    def losses(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with network_precision(device, dtype):
                output = model(x, t, y)
            return output.float()

        terms = process.training_losses(forward, batch.latents, batch.t, batch.labels, batch.noise)
        return {name: values.mean() for name, values in terms.items()}

    train(
        state,
        batches,
        losses,
        config,
        report=lambda step, metrics: report(metrics),
        save=lambda state: None,
        backward=functools.partial(backward_in, device, dtype),
        stop=stop,
    )
