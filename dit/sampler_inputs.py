"""What all samplers take, and how they check it; `dit.samplers` describes the arguments."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.sampler_names import SAMPLER_PROCESSES, fitting_samplers
from raydit.errors import InvalidInput

Model = Callable[..., Tensor]
StepNoise = Callable[[int, Tensor], Tensor]
StepCallback = Callable[[int, Tensor], None]


def check_fit(sampler: str, process: GaussianDiffusion | FlowMatching, steps: int, *, fewest: int = 1) -> None:
    """Raise InvalidInput if a sampler does not integrate the process, or for fewer steps than it can take."""
    kinds = SAMPLER_PROCESSES[sampler]
    if process.kind not in kinds:
        raise InvalidInput(
            f"sampler {sampler!r} is for {' and '.join(kinds)} models, and this model was trained with {process.kind}",
            "a sampler for its process",
            f"use {' or '.join(fitting_samplers(process.kind))}",
        )
    if steps < fewest:
        raise InvalidInput(f"{steps} sampling steps requested", f"at least {fewest}", "use more steps")


def draw_noise(step_noise: StepNoise | None, i: int, x: Tensor) -> Tensor:
    """Return the noise of step i, in the shape of x: that of `step_noise`, or of torch's global generator."""
    return torch.randn_like(x) if step_noise is None else step_noise(i, x)


def times_like(x: Tensor, t: float) -> Tensor:
    """Return the time t for every image of x: (N,), of integers if t is an integer."""
    return torch.full((len(x),), t, device=x.device)
