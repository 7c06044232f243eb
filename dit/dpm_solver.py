"""DPM-Solver++ (2M), for diffusion and for flow."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit.conditions import LabelsOrConditions
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.parameterizations import x0_and_eps
from dit.sampler_inputs import Model, StepCallback, StepNoise, check_fit, times_like
from dit.time_shift import shift_time
from raydit.errors import InvalidInput

FLOW_START = 1e-3
"""Time at which sampling from a flow starts, as in diffusers: at 0 the signal-to-noise ratio has no logarithm."""


class _NoiseLevel(NamedTuple):
    """A point on the path from noise to data, where x = alpha x0 + sigma noise."""

    time: float
    """The time that the model is called with: an integer for a diffusion."""
    alpha: float
    sigma: float
    ratio: float
    """sigma / alpha."""


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: GaussianDiffusion | FlowMatching,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
    karras: bool = True,
    time_shift: float | None = None,
) -> Tensor:
    """Sample from a diffusion or a flow by DPM-Solver++ (2M): second order, one model evaluation per step.

    karras: for a diffusion, use the noise levels of Karras et al. 2022, eq. 5 (https://arxiv.org/abs/2206.00364), or
    else evenly spaced timesteps. A flow has equal steps from t = 0.001 to 1.
    time_shift: for a flow, factor a by which its times are shifted (`dit.time_shift`), or None for none.
    The first step and the last, which ends at noise level 0, are of first order, as in diffusers'
    DPMSolverMultistepScheduler (with use_flow_sigmas = True for a flow). step_noise is ignored, because the sampler is
    deterministic. Other arguments are described at the top of `dit.samplers`.
    Raises InvalidInput if a diffusion does not have more than `steps` timesteps.
    Source: Lu et al. 2022, algorithm 2 (https://arxiv.org/abs/2211.01095).
    """
    check_fit("dpmpp_2m", process, steps)
    if isinstance(process, GaussianDiffusion):
        levels = _diffusion_levels(process, steps, karras)
    else:
        levels = _flow_levels(steps, time_shift)
    x, previous = noise.float(), None
    for i, level in enumerate(levels):
        x0 = _predict_x0(process, model, x, level, labels)
        if i == steps - 1:
            x = x0
        else:
            end = levels[i + 1]
            h = math.log(level.ratio / end.ratio)  # step in half the log signal-to-noise ratio
            direction = x0
            if previous is not None:
                r = math.log(levels[i - 1].ratio / level.ratio) / h
                direction = x0 + (x0 - previous) / (2 * r)
            x = end.sigma / level.sigma * x - end.alpha * math.expm1(-h) * direction
        previous = x0
        if callback is not None:
            callback(i, x)
    return x


def _predict_x0(
    process: GaussianDiffusion | FlowMatching, model: Model, x: Tensor, level: _NoiseLevel, labels: LabelsOrConditions
) -> Tensor:
    """Return the model's estimate of the clean latents, (N, C, H, W), from those at a noise level."""
    prediction = process.predict(model, x, times_like(x, level.time), labels)[:, : x.shape[1]]
    if isinstance(process, FlowMatching):
        return x + level.sigma * prediction
    return x0_and_eps(process.prediction, prediction, x, level.alpha, level.sigma)[0]


def _flow_levels(steps: int, time_shift: float | None) -> list[_NoiseLevel]:
    times = [FLOW_START + (1 - FLOW_START) * i / steps for i in range(steps)]
    times = times if time_shift is None else [shift_time(t, time_shift) for t in times]
    return [_NoiseLevel(t, t, 1 - t, (1 - t) / t) for t in times]


def _diffusion_levels(process: GaussianDiffusion, steps: int, karras: bool) -> list[_NoiseLevel]:
    """Return noise levels in descending order, each with its nearest timestep."""
    table = ((1 - process.alphas_cumprod) / process.alphas_cumprod).sqrt()
    last = process.num_timesteps - 1
    if not 1 <= steps <= last:
        raise InvalidInput(f"{steps} sampling steps requested from dpmpp_2m", f"1 to {last}", "use fewer steps")
    if not karras:
        indices = torch.linspace(0, last, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]
        return [_level(ratio, index) for ratio, index in zip(table[indices].tolist(), indices.tolist(), strict=True)]
    rho = 7  # Karras et al. 2022, section 3.1
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = table[-1] ** (1 / rho), table[0] ** (1 / rho)
    ratios = (high + ramp * (low - high)) ** rho
    return [_level(ratio, _nearest_index(table.log(), math.log(ratio))) for ratio in ratios.tolist()]


def _level(ratio: float, index: int) -> _NoiseLevel:
    """Return the noise level of a diffusion, with alpha² + sigma² = 1, for the ratio sigma / alpha."""
    alpha = 1 / math.sqrt(1 + ratio**2)
    return _NoiseLevel(index, alpha, ratio * alpha, ratio)


def _nearest_index(log_table: Tensor, log_ratio: float) -> int:
    """Return the index, rounded, at which an ascending table, interpolated linearly, takes the value `log_ratio`."""
    low = int((log_table <= log_ratio).sum().clamp(1, len(log_table) - 1)) - 1
    fraction = (log_ratio - float(log_table[low])) / float(log_table[low + 1] - log_table[low])
    return round(low + min(max(fraction, 0.0), 1.0))
