"""Training steps of a DiT compiled block by block, compiled as a whole, and uncompiled: the first step and later ones.

Needs only torch. Asserts only that all three compute the same loss. On a GPU the model is DiT-XL/2 in bfloat16.
"""

import contextlib
import copy

import pytest
import torch
from harness import alternate, clocked
from test_dit import batch_of

from dit.compilation import compile_network
from dit.config import DiTConfig, named_config
from dit.diffusion import GaussianDiffusion
from dit.model import DiT
from dit.schedule import TrainingConfig
from dit.train import create_state, train_step

pytestmark = pytest.mark.benchmark

CASES = {
    "cpu": (
        "width 128, depth 8, batch 32, float32",
        DiTConfig(input_size=8, hidden_size=128, depth=8, num_heads=4),
        32,
    ),
    "cuda": ("DiT-XL/2, batch 128, bfloat16", named_config("DiT-XL/2"), 128),
}
COMPILED = {"blocks": compile_network, "whole": lambda network: network.compile(), "eager": lambda network: None}
"""Blocks are compiled first, so that they cannot reuse what was compiled for the whole network."""


def step_of(network, batch, device):
    """Return a function that takes one training step and returns the loss."""
    config, process = TrainingConfig(steps=10**9, global_batch_size=len(batch[0])), GaussianDiffusion()
    state = create_state(network, config)
    cast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def losses(model, batch):
        with cast:
            return {name: value.mean() for name, value in process.training_losses(model, *batch).items()}

    return lambda: float(train_step(state, batch, losses, config)["loss"])


def test_compilation(results, quick, tmp_path, monkeypatch):
    if quick:
        pytest.skip("compiles for two minutes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case, config, size = CASES[device]
    batch = [part.to(device) for part in batch_of(config, size)]
    torch.manual_seed(0)
    network = DiT(config).to(device)
    torch.compile(torch.sin)(torch.ones(2, device=device))  # imports the compiler, which takes seconds
    steps, first, losses = {}, {}, []
    for name, prepare in COMPILED.items():
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))  # as if nothing had been compiled before
        candidate = copy.deepcopy(network)
        prepare(candidate)
        steps[name] = step_of(candidate, batch, device)
        first[name] = clocked(lambda step=steps[name]: losses.append(step()))()
    torch.testing.assert_close(losses, [losses[-1]] * 3, rtol=1e-2, atol=1e-4)

    rounds = 20 if device == "cuda" else 30
    timings = alternate(steps, rounds=rounds, warmup=5)
    milliseconds = {name: f"{1e3 * timing.median:.1f} ms" for name, timing in timings.items()}
    for other in ("whole", "eager"):
        against = {"whole": "compiled as a whole", "eager": "uncompiled"}[other]
        measured = f"{milliseconds['blocks']} (the other {milliseconds[other]})"
        results.add_speedup("step compiled by block", case, measured, against, timings["blocks"], timings[other])
    measured = f"{first['blocks']:.1f} s (the other {first['whole']:.1f} s)"
    ratio = first["whole"] / first["blocks"]
    results.add("first step compiled by block", case, measured, "compiled as a whole", ratio)
