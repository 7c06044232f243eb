"""Samplers, which turn noise into latents with a trained model; and guidance, which wraps the model.

All samplers have the signature (model, noise, labels, *, process, steps, step_noise=None, callback=None):

    model       a DiT, a U-ViT or any callable model(x, t, labels), which gets the labels as they are given
    noise       (N, C, H, W) where sampling starts
    labels      (N,) classes, or Conditions of N images, or None for an unconditional model
    process     the diffusion or flow that the model was trained with
    steps       number of sampling steps
    step_noise  step_noise(i, x) returns the noise of step i, in the shape of x, for samplers that add noise; by
                default it comes from torch's global generator. Derived from each sample's own seed, it makes a
                sample independent of its batch
    callback    callback(i, x) is called with the latents after step i, for instance to display progress
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit.conditions import Conditions, LabelsOrConditions, as_conditions
from dit.config import SAMPLER_PROCESSES
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.parameterizations import x0_and_eps
from raydit.errors import InvalidInput

Model = Callable[..., Tensor]
StepNoise = Callable[[int, Tensor], Tensor]
StepCallback = Callable[[int, Tensor], None]


@torch.no_grad()
def sample_ddpm(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: GaussianDiffusion,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample from a diffusion by ancestral sampling, on evenly spaced timesteps; the last step adds no noise.

    Arguments are described at the top of this module. Raises InvalidInput if the process is not a diffusion, or has
    fewer than `steps` timesteps.
    Source: Ho et al. 2020, algorithm 2 (https://arxiv.org/abs/2006.11239); spacing: iDDPM, section 4.
    """
    _check_fit("ddpm", process, steps)
    spaced = process.spaced(steps)
    x = noise.float()
    for i, t in _descending(spaced, x):
        step = spaced.reverse_step(spaced.predict(model, x, t, labels), x, t)
        last = i == steps - 1
        x = step.mean if last else step.mean + torch.exp(0.5 * step.log_variance) * _draw(step_noise, i, x)
        if callback is not None:
            callback(i, x)
    return x


@torch.no_grad()
def sample_ddim(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: GaussianDiffusion,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Sample from a diffusion by DDIM, on evenly spaced timesteps.

    eta: share of the posterior's standard deviation that each step adds as noise; 0 is deterministic, 1 is ancestral
    sampling. A learned variance is ignored. "ddimN" in other code means a constant stride: for it, pass
    process.spaced(N, constant_stride=True) and N steps. Other arguments are described at the top of this module.
    Raises InvalidInput if the process is not a diffusion, or has fewer than `steps` timesteps.
    Source: Song et al. 2020, eq. 12 and 16 (https://arxiv.org/abs/2010.02502).
    """
    _check_fit("ddim", process, steps)
    spaced = process.spaced(steps)
    x = noise.float()
    for i, t in _descending(spaced, x):
        prediction = spaced.predict(model, x, t, labels)[:, : x.shape[1]]
        x0, eps = spaced.to_x0_and_eps(prediction, x, t)
        abar = float(spaced.alphas_cumprod[steps - 1 - i])
        abar_prev = float(spaced.alphas_cumprod_prev[steps - 1 - i])
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        x = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * _draw(step_noise, i, x)
        if callback is not None:
            callback(i, x)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: GaussianDiffusion,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
    karras: bool = True,
) -> Tensor:
    """Sample from a diffusion by DPM-Solver++ (2M): second order, one model evaluation per step.

    karras: use the noise levels of Karras et al. 2022, eq. 5 (https://arxiv.org/abs/2206.00364), or else evenly
    spaced timesteps. The first step and the last, which ends at noise level 0, are of first order, as in diffusers'
    DPMSolverMultistepScheduler. step_noise is ignored, because the sampler is deterministic. Other arguments are
    described at the top of this module.
    Raises InvalidInput if the process is not a diffusion, or does not have more than `steps` timesteps.
    Source: Lu et al. 2022, algorithm 2 (https://arxiv.org/abs/2211.01095).
    """
    _check_fit("dpmpp_2m", process, steps)
    ratios, indices = _dpm_noise_levels(process, steps, karras)
    x, previous = noise.float(), None
    for i, index in enumerate(indices):
        t = torch.full((len(x),), index, device=x.device)
        prediction = process.predict(model, x, t, labels)[:, : x.shape[1]]
        alpha, sigma = _alpha_sigma(ratios[i])
        x0, _ = x0_and_eps(process.prediction, prediction, x, alpha, sigma)
        if i == steps - 1:
            x = x0
        else:
            alpha_next, sigma_next = _alpha_sigma(ratios[i + 1])
            h = math.log(ratios[i] / ratios[i + 1])  # step in half the log signal-to-noise ratio
            direction = x0
            if previous is not None:
                r = math.log(ratios[i - 1] / ratios[i]) / h
                direction = x0 + (x0 - previous) / (2 * r)
            x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * direction
        previous = x0
        if callback is not None:
            callback(i, x)
    return x


@torch.no_grad()
def sample_euler(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: FlowMatching,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample from a flow by Euler's method, in equal steps from t = 0 (noise) to t = 1 (data).

    step_noise is ignored, because the sampler is deterministic. Other arguments are described at the top of this
    module. Raises InvalidInput if the process is not a flow.
    """
    _check_fit("euler", process, steps)
    x = noise.float()
    for i in range(steps):
        x = x + process.predict(model, x, _time(x, i / steps), labels) / steps
        if callback is not None:
            callback(i, x)
    return x


@torch.no_grad()
def sample_heun(
    model: Model,
    noise: Tensor,
    labels: LabelsOrConditions,
    *,
    process: FlowMatching,
    steps: int,
    step_noise: StepNoise | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample from a flow by Heun's method: second order, two model evaluations per step.

    Steps are equal, from t = 0 (noise) to t = 1 (data). step_noise is ignored, because the sampler is deterministic.
    Other arguments are described at the top of this module. Raises InvalidInput if the process is not a flow.
    """
    _check_fit("heun", process, steps)
    x = noise.float()
    for i in range(steps):
        velocity = process.predict(model, x, _time(x, i / steps), labels)
        ahead = process.predict(model, x + velocity / steps, _time(x, (i + 1) / steps), labels)
        x = x + (velocity + ahead) / (2 * steps)
        if callback is not None:
            callback(i, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {name: globals()[f"sample_{name}"] for name in SAMPLER_PROCESSES}
"""The samplers by their names in recipes: one function, `sample_<name>`, for each name in `SAMPLER_PROCESSES`."""


def guided(
    model: Model,
    cfg_scale: float,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    null: Tensor | Conditions | None = None,
) -> Model:
    """Wrap a model for classifier-free guidance: it returns uncond + cfg_scale * (cond - uncond), at twice the cost.

    cfg_scale: 1.0 means no guidance, and returns the model itself.
    channels: number of leading latent channels to guide (3 in DiT's published numbers), or None for all. Other
    channels, and those of a learned sigma, remain conditional.
    interval: guide only where low <= t <= high, in the model's own t (diffusion: 0 clean to 999 noise; flow: 0 noise
    to 1 data), or None for all t.
    null: labels or Conditions that uncond is for, of one image or of as many as the batch, or None for the model's null
    class. Others than null ones are negative conditions, which guidance leads away from.
    Raises InvalidInput if there is neither null nor a null class, or for channels or an interval out of range. The
    wrapped model raises it if null does not fit the conditions that it is called with.
    Sources: Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), Kynkäänniemi et al. 2024
    (https://arxiv.org/abs/2404.07724).
    """
    if cfg_scale == 1.0:
        return model
    null_class = getattr(model, "null_class", None)
    if null is None and null_class is None:
        raise InvalidInput(
            f"cfg_scale is {cfg_scale} for a model with no null class",
            "1.0, or a model that was trained with one",
            "use cfg_scale 1.0, or train with classes and condition_dropout_prob above 0",
        )
    if channels is not None and channels < 1:
        raise InvalidInput(f"cfg_channels is {channels}", "1 or more", "leave it out to guide all channels")
    if interval is not None and interval[0] > interval[1]:
        raise InvalidInput(f"cfg_interval is {interval}", "(low, high)", "swap the two numbers")

    def guided_model(x: Tensor, t: Tensor, y: Tensor | Conditions) -> Tensor:
        inside = torch.ones_like(t, dtype=torch.bool)
        if interval is not None:
            inside = (t >= interval[0]) & (t <= interval[1])
            if not inside.any():
                return model(x, t, y)
        both = _followed_by_null(y, null, null_class)
        # In float32, because guidance amplifies the difference of two close numbers.
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        count = x.shape[1] if channels is None else min(channels, x.shape[1])
        cond, uncond, rest = cond[:, :count], uncond[:, :count], cond[:, count:]
        scale = torch.where(inside, cfg_scale, 1.0).view(-1, 1, 1, 1)
        return torch.cat([uncond + scale * (cond - uncond), rest], dim=1)

    return guided_model


def _followed_by_null(
    y: Tensor | Conditions, null: Tensor | Conditions | None, null_class: int | None
) -> Tensor | Conditions | None:
    """Return the conditions of N images, and after them those of N without conditions; labels if y is labels."""
    conditional = as_conditions(y)
    unconditional = conditional.null(null_class=null_class) if null is None else as_conditions(null)
    if len(unconditional) == 1:
        unconditional = unconditional.repeat(len(conditional))
    if len(unconditional) != len(conditional):
        raise InvalidInput(
            f"null conditions of {len(unconditional)} images for a batch of {len(conditional)}",
            "those of one image, or of as many as the batch",
            "give one, which serves all images",
        )
    both = Conditions.cat([conditional, unconditional])
    return both if isinstance(y, Conditions) else both.labels


def _check_fit(sampler: str, process: GaussianDiffusion | FlowMatching, steps: int) -> None:
    kind = SAMPLER_PROCESSES[sampler]
    if process.kind != kind:
        fitting = [name for name, k in SAMPLER_PROCESSES.items() if k == process.kind]
        raise InvalidInput(
            f"sampler {sampler!r} is for {kind} models, and this model was trained with {process.kind}",
            "a sampler for its process",
            f"use {' or '.join(fitting)}",
        )
    if steps < 1:
        raise InvalidInput(f"{steps} sampling steps requested", "at least 1", "use more steps")


def _draw(step_noise: StepNoise | None, i: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if step_noise is None else step_noise(i, x)


def _descending(process: GaussianDiffusion, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each sampling step i with its timestep for every image, (N,), in descending order of noise."""
    for i in range(process.num_timesteps):
        yield i, torch.full((len(x),), process.num_timesteps - 1 - i, device=x.device)


def _time(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


def _dpm_noise_levels(process: GaussianDiffusion, steps: int, karras: bool) -> tuple[list[float], list[int]]:
    """Return the noise-to-signal ratios sigma / alpha, descending, and the indices of their nearest timesteps."""
    table = ((1 - process.alphas_cumprod) / process.alphas_cumprod).sqrt()
    last = process.num_timesteps - 1
    if not 1 <= steps <= last:
        raise InvalidInput(f"{steps} sampling steps requested from dpmpp_2m", f"1 to {last}", "use fewer steps")
    if not karras:
        indices = torch.linspace(0, last, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]
        return table[indices].tolist(), indices.tolist()
    rho = 7  # Karras et al. 2022, section 3.1
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = table[-1] ** (1 / rho), table[0] ** (1 / rho)
    ratios = (high + ramp * (low - high)) ** rho
    return ratios.tolist(), [_nearest_index(table.log(), math.log(ratio)) for ratio in ratios.tolist()]


def _nearest_index(log_table: Tensor, log_ratio: float) -> int:
    """Return the index, rounded, at which an ascending table, interpolated linearly, takes the value `log_ratio`."""
    low = int((log_table <= log_ratio).sum().clamp(1, len(log_table) - 1)) - 1
    fraction = (log_ratio - float(log_table[low])) / float(log_table[low + 1] - log_table[low])
    return round(low + min(max(fraction, 0.0), 1.0))


def _alpha_sigma(ratio: float) -> tuple[float, float]:
    """Return the signal and noise coefficients, with alpha² + sigma² = 1, for the ratio sigma / alpha."""
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha
