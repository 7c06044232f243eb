"""Whether CUDA graphs help where launching kernels takes longer than computing them; needs only torch.

A CUDA graph is a sequence of kernels that is recorded once, and then launched as one.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from gpu_bench import PROCESS, Bench
from gpu_report import Figure
from gpu_training import Batch, batch_of, measure_training, relative_difference, unchanged
from harness import alternate
from torch import Tensor

from dit.precision import in_dtype, network_precision
from dit.samplers import guided, sample_ddpm

NAME = "DiT-S/2"
SAMPLES, TRAINED, STEPS = 4, 16, 50
DTYPE = "bfloat16"


def compare_graphs(bench: Bench) -> Iterator[Figure]:
    """Measure a guided sampling step and a training step of a small model on few images, with graphs and without."""
    if bench.device.type == "cpu":
        yield Figure(what="CUDA graphs", value=None, note="left out: needs a GPU")
        return
    yield from compare_sampling(bench)
    yield from compare_training(bench)


def compare_sampling(bench: Bench) -> Iterator[Figure]:
    """Measure guided sampling steps, both ways in turn."""
    network = bench.network(NAME).eval()
    bench.compile(network)
    batch = batch_of(network.config, SAMPLES, PROCESS).to(bench.device)
    model = guided(in_dtype(network, DTYPE), 1.5, 3)
    inputs = (batch.noise, batch.t, batch.labels)
    recorded = record_forward(model, *inputs)
    with torch.no_grad():
        details = {"with": {"relative difference": relative_difference(recorded(*inputs), model(*inputs))}}
    draws = {
        name: functools.partial(sample_ddpm, each, batch.noise, batch.labels, process=PROCESS, steps=STEPS)
        for name, each in (("without", model), ("with", recorded))
    }
    for name, timing in alternate(draws, rounds=3, warmup=1).items():
        what = f"guided sampling step {NAME}, batch {SAMPLES}, {DTYPE}, compiled by blocks, {name} CUDA graphs"
        yield Figure(what=what, value=1e3 * timing.median / STEPS, unit="ms", details=details.get(name, {}))


def compare_training(bench: Bench) -> Iterator[Figure]:
    """Measure training steps; the graphs hold the network's forward and backward pass."""
    config = bench.model(NAME)
    batch = batch_of(config, TRAINED, PROCESS).to(bench.device)
    for name, wrap in (("without", unchanged), ("with", functools.partial(record_passes, batch=batch))):
        network = bench.network(NAME)
        bench.compile(network)
        measured = measure_training(
            network,
            itertools.repeat(batch),
            PROCESS,
            bench.device,
            size=TRAINED,
            window=50,
            seconds=8,
            dtype=DTYPE,
            wrap=wrap,
        )
        what = f"training step {NAME}, batch {TRAINED}, {DTYPE}, compiled by blocks, {name} CUDA graphs"
        yield Figure(what=what, value=measured.images_per_second, unit="images/s")


def record_passes(network: torch.nn.Module, batch: Batch) -> torch.nn.Module:
    """Return a module that replays CUDA graphs of the network's forward and backward pass on batches like `batch`."""
    inputs = (batch.latents, batch.t, batch.labels)
    return torch.cuda.make_graphed_callables(InPrecision(network, batch.latents.device), inputs)


class InPrecision(torch.nn.Module):
    """Calls a network in bfloat16, so that the casts of its weights are part of a graph."""

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with network_precision(self.device, DTYPE):
            return self.network(x, t, y)


@torch.no_grad()
def record_forward(model: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """Return a function that replays a CUDA graph of model(*inputs), for inputs of the same shapes.

    What it returns is overwritten by its next call.
    """
    kept = [each.clone() for each in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets libraries set up what must not happen while recording
        for _ in range(3):
            model(*kept)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(*kept)

    def replay(*inputs: Tensor) -> Tensor:
        for ours, given in zip(kept, inputs, strict=True):
            ours.copy_(given)
        graph.replay()
        return output

    return replay
