"""Training steps of the official DiT, to compare raydit's with; needs torch, timm, and a copy of its models.py.

That file's licence is non-commercial, so it is not part of raydit: `--official FILE` names the user's own copy.
"""

import importlib.util
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from gpu_bench import PROCESS, Bench
from gpu_report import Figure
from gpu_training import Batch, batch_of, training_figure
from harness import alternate

from dit.precision import backward_in, network_precision

ROUNDS = 8
"""Measured steps."""


def official_training(bench: Bench, file: Path | None, *, images: int, compiled: bool) -> Iterator[Figure]:
    """Measure steps of the official DiT-XL/2 in the loop that it was published with.

    That loop has AdamW, an average of the weights that is updated one parameter at a time, and reads the loss at every
    step. compiled: in bfloat16, with compiled blocks; otherwise in TF32 and eager, as published.
    """
    if file is None:
        yield Figure(what="official DiT-XL/2", value=None, note="left out: name a copy of its models.py by --official")
        return
    name, size, config, product = "DiT-XL/2", bench.size(images), bench.model("DiT-XL/2"), bench.product()
    network = load_official(file)(
        input_size=config.latent_size[0],
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
    ).to(bench.device)
    if compiled:
        bench.compile(network)
    dtype = "bfloat16" if compiled else "tf32"
    step = published_step(network, batch_of(config, size, PROCESS).to(bench.device), bench.device, dtype)
    seconds = alternate({"step": step}, rounds=ROUNDS, warmup=3)["step"].median
    how = "bfloat16, compiled by blocks" if compiled else "TF32, as published"
    what = f"training step of the official {bench.label(name)}, batch {size}, {how}"
    yield training_figure(what, config, size / seconds, product)


def load_official(file: Path) -> Callable[..., torch.nn.Module]:
    """Return the class DiT of a copy of the official file. Raises ImportError without timm."""
    spec = importlib.util.spec_from_file_location("official_dit", file)
    assert spec is not None and spec.loader is not None, "a file with Python source has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DiT


def published_step(network: torch.nn.Module, batch: Batch, device: torch.device, dtype: str) -> Callable[[], float]:
    """Return a function that takes one training step, and returns the loss."""
    average = deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        with network_precision(device, dtype):
            output = network(*inputs)
        return output.float()

    def step() -> float:
        terms = PROCESS.training_losses(forward, batch.latents, batch.t, batch.labels, batch.noise)
        loss = terms["loss"].mean()
        optimizer.zero_grad()
        backward_in(device, dtype, loss)
        optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), network.parameters(), strict=True):
                averaged.mul_(0.9999).add_(parameter, alpha=1e-4)
        return loss.item()

    return step
