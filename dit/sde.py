"""Sampling from a flow by a stochastic differential equation, as SiT does."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit.conditions import LabelsOrConditions
from dit.flow import FlowMatching
from dit.sampler_inputs import Model, StepCallback, StepNoise, check_fit, draw_noise, times_like
from dit.sampler_names import SdeDiffusion
from dit.time_shift import shift_time

LAST_STEP = 0.04
"""Length of the last step, which adds no noise, so that none is left in the samples."""
FIRST_SBDM_TIME = 1e-3
"""Time at which "sbdm" starts, because its diffusion is infinite at 0."""

DIFFUSIONS: dict[SdeDiffusion, Callable[[float, float], float]] = {
    "constant": lambda t, norm: norm,
    "sbdm": lambda t, norm: norm * (1 - t) / t,
    "sigma": lambda t, norm: norm * (1 - t),
    "decreasing": lambda t, norm: 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
    "increasing_decreasing": lambda t, norm: norm * math.sin(math.pi * t) ** 2,
}
"""Diffusion D(t) by name, for a time t (0 noise, 1 data) and the norm; twice D is the coefficient w of SiT's paper."""


@torch.no_grad()
def sample_sde(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: FlowMatching,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
    time_shift: float | None = None,
    diffusion: SdeDiffusion = "sigma",
    norm: float = 1.0,
) -> Tensor:
    """Sample from a flow by Euler-Maruyama's method on dx = (v + D s) dt + sqrt(2 D) dw.

    v is the model's velocity and s = (t v - x) / (1 - t) the score that follows from it. The samples' distribution at
    each time is that of the flow, whatever the diffusion D. There are steps - 1 equal steps on [0, 0.96], and a last
    one of 0.04 to t = 1 along the drift only.
    time_shift: factor a by which all these times are shifted (`dit.time_shift`), or None for none.
    diffusion, norm: D(t), see DIFFUSIONS; the defaults are those of SiT's published samples (FID 2.06), with 250 steps.
    Other arguments are described at the top of `dit.samplers`. Raises InvalidInput if the process is not a flow, or for
    fewer than 2 steps.
    Source: Ma et al. 2024, eq. 4, 5 and 9, and appendix (https://arxiv.org/abs/2401.08740).
    """
    check_fit("sde", process, steps, fewest=2)
    times = sde_times(steps, time_shift, diffusion)
    x = noise.float()
    for i, (t, end) in enumerate(zip(times, times[1:], strict=False)):
        velocity = process.predict(model, x, times_like(x, t), labels)
        strength = DIFFUSIONS[diffusion](t, norm)
        score = (t * velocity - x) / (1 - t)
        x = x + (end - t) * (velocity + strength * score)
        if i < steps - 1:
            x = x + math.sqrt(2 * strength * (end - t)) * draw_noise(step_noise, i, x)
        if callback is not None:
            callback(i, x)
    return x


def sde_times(steps: int, time_shift: float | None, diffusion: SdeDiffusion) -> list[float]:
    """Return the steps + 1 times between which `sample_sde` steps, from noise to data."""
    first, last = FIRST_SBDM_TIME if diffusion == "sbdm" else 0.0, 1 - LAST_STEP
    times = [first + (last - first) * i / (steps - 1) for i in range(steps)] + [1.0]
    return times if time_shift is None else [shift_time(t, time_shift) for t in times]
