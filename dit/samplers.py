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
from dit.diffusion import GaussianDiffusion
from dit.dpm_solver import sample_dpmpp_2m
from dit.flow import FlowMatching
from dit.sampler_inputs import Model, StepCallback, StepNoise, check_fit, draw_noise, times_like
from dit.sde import sample_sde
from dit.time_shift import time_grid
from raydit.errors import InvalidInput


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
    check_fit("ddpm", process, steps)
    spaced = process.spaced(steps)
    x = noise.float()
    for i, t in _descending(spaced, x):
        step = spaced.reverse_step(spaced.predict(model, x, t, labels), x, t)
        last = i == steps - 1
        x = step.mean if last else step.mean + torch.exp(0.5 * step.log_variance) * draw_noise(step_noise, i, x)
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
    check_fit("ddim", process, steps)
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
            x = x + sigma * draw_noise(step_noise, i, x)
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
    time_shift: float | None = None,
) -> Tensor:
    """Sample from a flow by Euler's method, in equal steps from t = 0 (noise) to t = 1 (data).

    time_shift: factor a by which the times are shifted (`dit.time_shift`), or None for none.
    step_noise is ignored, because the sampler is deterministic. Other arguments are described at the top of this
    module. Raises InvalidInput if the process is not a flow.
    """
    check_fit("euler", process, steps)
    x = noise.float()
    for i, (t, _, inverse_length) in enumerate(time_grid(steps, time_shift)):
        x = x + process.predict(model, x, times_like(x, t), labels) / inverse_length
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
    time_shift: float | None = None,
) -> Tensor:
    """Sample from a flow by Heun's method: second order, two model evaluations per step.

    Steps are equal, from t = 0 (noise) to t = 1 (data), unless time_shift is the factor by which they are shifted, as
    for `sample_euler`. step_noise is ignored, because the sampler is deterministic. Other arguments are described at
    the top of this module. Raises InvalidInput if the process is not a flow.
    """
    check_fit("heun", process, steps)
    x = noise.float()
    for i, (t, end, inverse_length) in enumerate(time_grid(steps, time_shift)):
        velocity = process.predict(model, x, times_like(x, t), labels)
        ahead = process.predict(model, x + velocity / inverse_length, times_like(x, end), labels)
        x = x + (velocity + ahead) / (2 * inverse_length)
        if callback is not None:
            callback(i, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "euler": sample_euler,
    "heun": sample_heun,
    "sde": sample_sde,
    "dpmpp_2m": sample_dpmpp_2m,
}
"""The samplers by their names in recipes, which are those in `SAMPLER_PROCESSES`."""


def guided(
    model: Model,
    cfg_scale: float,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    null: Tensor | Conditions | None = None,
    guide: Model | None = None,
) -> Model:
    """Wrap a model for classifier-free guidance: it returns uncond + cfg_scale * (cond - uncond), at twice the cost.

    cfg_scale: 1.0 means no guidance, and returns the model itself.
    channels: number of leading latent channels to guide (3 in DiT's published numbers), or None for all. Other
    channels, and those of a learned sigma, remain conditional.
    interval: guide only where low <= t <= high, in the model's own t (diffusion: 0 clean to 999 noise; flow: 0 noise
    to 1 data), or None for all t.
    null: labels or Conditions that uncond is for, of one image or of as many as the batch, or None for the model's null
    class. Others than null ones are negative conditions, which guidance leads away from.
    guide: a model for autoguidance, whose prediction under the same conditions takes the place of uncond: a smaller
    one, or one that was trained less. Its latents and process must be the model's, and null is ignored.
    Raises InvalidInput if there is neither null nor a null class nor a guide, or for channels or an interval out of
    range. The wrapped model raises it if null does not fit the conditions that it is called with.
    Sources: Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), Kynkäänniemi et al. 2024
    (https://arxiv.org/abs/2404.07724); autoguidance: Karras et al. 2024 (https://arxiv.org/abs/2406.02507).
    """
    if cfg_scale == 1.0:
        return model
    null_class = getattr(model, "null_class", None)
    if null is None and null_class is None and guide is None:
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
        # In float32, because guidance amplifies the difference of two close numbers.
        if guide is None:
            both = _followed_by_null(y, null, null_class)
            cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        else:
            cond, uncond = model(x, t, y).float(), guide(x, t, y).float()
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


def _descending(process: GaussianDiffusion, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each sampling step i with its timestep for every image, (N,), in descending order of noise."""
    for i in range(process.num_timesteps):
        yield i, torch.full((len(x),), process.num_timesteps - 1 - i, device=x.device)
