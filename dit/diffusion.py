"""Gaussian diffusion: noise schedules, posterior, training losses, and the same process in fewer steps."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from dit.conditions import LabelsOrConditions
from dit.config import Prediction, ProcessKind, Schedule, Variance, Weighting
from dit.parameterizations import Parameterization, convert_prediction, from_x0_and_eps, loss_weight, x0_and_eps
from dit.sampler_names import NUM_TIMESTEPS
from raydit.errors import InvalidInput


class ReverseStep(NamedTuple):
    """Gaussian p(x_{t-1} | x_t) that the model predicts for the next, less noisy latents; all are (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    """The clean latents that the model predicts from x_t."""


class GaussianDiffusion:
    """Forward and reverse process of a diffusion model in num_timesteps steps.

    Tables are float64 on the CPU; values gathered from them, and all results, are float32. Timesteps given to these
    methods index this process. The model always receives the corresponding timestep of the full process
    (`timesteps`), so that a spaced process is used like a full one.
    Sources: DDPM (https://arxiv.org/abs/2006.11239), iDDPM (https://arxiv.org/abs/2102.09672).
    """

    kind: ClassVar[ProcessKind] = "diffusion"

    def __init__(
        self,
        num_timesteps: int = NUM_TIMESTEPS,
        schedule: Schedule = "linear",
        prediction: Prediction = "eps",
        variance: Variance = "learned_range",
        weighting: Weighting = "none",
        min_snr_gamma: float = 5.0,
    ) -> None:
        """Build the tables of a process. Raises InvalidInput for an unknown choice or a value out of range.

        prediction: what the network outputs; v as in https://arxiv.org/abs/2202.00512.
        variance: learned_range (the network outputs 2C channels), that of the posterior (fixed_small), or beta
        (fixed_large).
        weighting: how the squared error is weighted by timestep (`dit.parameterizations.loss_weight`).
        min_snr_gamma: gamma of the weighting "min_snr"; 5 as in its paper.
        """
        for name, value, choices in (
            ("schedule", schedule, get_args(Schedule)),
            ("prediction", prediction, get_args(Prediction)),
            ("variance", variance, get_args(Variance)),
            ("weighting", weighting, get_args(Weighting)),
        ):
            if value not in choices:
                raise InvalidInput(f"{name} is {value!r}", f"one of {', '.join(choices)}", "choose one of them")
        if min_snr_gamma <= 0:
            raise InvalidInput(f"min_snr_gamma is {min_snr_gamma}", "a number above 0", "use 5 as in the paper")
        self.prediction = prediction
        self.variance = variance
        self.weighting = weighting
        self.min_snr_gamma = min_snr_gamma
        alphas_cumprod = torch.cumprod(1 - _betas(schedule, num_timesteps), dim=0)
        self._set_tables(alphas_cumprod, torch.arange(num_timesteps))

    def _set_tables(self, alphas_cumprod: Tensor, timesteps: Tensor) -> None:
        self.num_timesteps = len(timesteps)
        self.timesteps = timesteps
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        self.betas = 1 - alphas_cumprod / self.alphas_cumprod_prev
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self.loss_weight = loss_weight(self.weighting, self.prediction, snr, self.min_snr_gamma)
        # Posterior q(x_{t-1} | x_t, x_0): DDPM eq. 7.
        rest, rest_prev = 1 - alphas_cumprod, 1 - self.alphas_cumprod_prev
        self.posterior_variance = self.betas * rest_prev / rest
        self.posterior_mean_x0 = self.betas * self.alphas_cumprod_prev.sqrt() / rest
        self.posterior_mean_xt = rest_prev * (1 - self.betas).sqrt() / rest
        # The posterior variance of the step to clean latents is 0: the next step's is used in its logarithm.
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.log_variance_small = torch.cat([first, self.posterior_variance[1:]]).log()
        self.log_variance_large = torch.cat([first, self.betas[1:]]).log()
        self.log_betas = self.betas.log()
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return entries t (N,) of a table as float32, shaped to broadcast over `like` (N, ...)."""
        return self._gather(name, t).float().view(-1, *[1] * (like.ndim - 1))

    def _gather(self, name: str, t: Tensor) -> Tensor:
        """Return entries t (N,) of a table, on t's device. Raises ValueError if t is out of range.

        Every method that takes timesteps calls this, because a negative index would silently count from the end.
        The range is checked on the CPU only: on a GPU the check would wait for the device.
        """
        if t.is_floating_point() or (t.device.type == "cpu" and not bool(((t >= 0) & (t < self.num_timesteps)).all())):
            raise ValueError(
                f"timesteps are {t.dtype} from {t.min().item()} to {t.max().item()}, expected integers in "
                f"[0, {self.num_timesteps}). Draw them with sample_timesteps"
            )
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).to(t.device)
        return self._on_device[key][t]

    def spaced(self, steps: int, constant_stride: bool = False) -> "GaussianDiffusion":
        """Return this process in fewer steps, with betas recomputed from the cumulative products that are kept.

        Keeps evenly spaced timesteps, rounded, including both ends (iDDPM, section 4); one step keeps the last.
        constant_stride: keep 0, k, 2k, ... for the smallest k that gives `steps` (DDIM, appendix D.3).
        Raises InvalidInput if the process has fewer timesteps, or if no constant stride gives `steps`.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise InvalidInput(
                f"{steps} sampling steps requested from a process of {self.num_timesteps} timesteps",
                f"1 to {self.num_timesteps}",
                "change the number of steps",
            )
        kept = (_strided if constant_stride else _evenly_spaced)(self.num_timesteps, steps)
        process = copy.copy(self)
        process._set_tables(self.alphas_cumprod[kept], self.timesteps[kept])
        return process

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map independent uniform numbers (N,) in [0, 1) to training timesteps (N,) int64."""
        return (uniform.double() * self.num_timesteps).long()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean latents to timestep t: sqrt(abar_t) latents + sqrt(1 - abar_t) noise.

        latents, noise: (N, C, H, W). t: (N,) integers in [0, num_timesteps).
        Source: Ho et al. 2020, eq. 4 (https://arxiv.org/abs/2006.11239).
        Raises ValueError if shapes differ, or t (on the CPU) is out of range.
        """
        _check_shapes(latents, noise, t)
        alpha, sigma = self._alpha_sigma(t, latents)
        return alpha * latents.float() + sigma * noise.float()

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("sqrt_alphas_cumprod", t, like), self._at("sqrt_one_minus_alphas_cumprod", t, like)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the output that the network is trained for, given latents and noise (N, C, H, W), timesteps (N,)."""
        return from_x0_and_eps(self.prediction, latents.float(), noise.float(), *self._alpha_sigma(t, latents))

    def to_x0_and_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return clean latents and noise, both (N, C, H, W), from the network's prediction for x_t."""
        return x0_and_eps(self.prediction, prediction, x_t, *self._alpha_sigma(t, x_t))

    def convert_prediction(self, prediction: Tensor, x_t: Tensor, t: Tensor, *, target: Parameterization) -> Tensor:
        """Convert the network's prediction for x_t, both (N, C, H, W), to "eps", "x0", "v" or "score".

        t: (N,) timesteps. Source: see `dit.parameterizations`.
        """
        alpha, sigma = self._alpha_sigma(t, x_t)
        return convert_prediction(prediction, x_t, alpha, sigma, source=self.prediction, target=target)

    def posterior(self, latents: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (N, C, H, W) and log variance (N, 1, 1, 1) of q(x_{t-1} | x_t, x_0). Source: DDPM, eq. 7.

        latents, x_t: (N, C, H, W) clean and noised latents. t: (N,) timesteps.
        """
        mean_x0, mean_xt = self._at("posterior_mean_x0", t, x_t), self._at("posterior_mean_xt", t, x_t)
        return mean_x0 * latents + mean_xt * x_t, self._at("log_variance_small", t, x_t)

    def predict(self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: LabelsOrConditions) -> Tensor:
        """Run the model at timesteps t (N,) of this process and return its output, (N, C or 2C, H, W) float32.

        Raises InvalidInput if the number of output channels does not fit the variance.
        """
        output = model(x_t, self._gather("timesteps", t), labels)
        expected = x_t.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != expected:
            raise InvalidInput(
                f"the model returns {output.shape[1]} channels",
                f"{expected} for variance {self.variance!r}",
                'use learn_sigma with "learned_range", and only with it',
            )
        return output.float()

    def reverse_step(self, output: Tensor, x_t: Tensor, t: Tensor) -> ReverseStep:
        """Return the Gaussian p(x_{t-1} | x_t) that the model's output describes; x0 is not clipped.

        output: (N, 2C, H, W) with learned range, else (N, C, H, W). x_t: (N, C, H, W). t: (N,).
        Source: DDPM eq. 11; learned range: iDDPM eq. 15.
        """
        channels = x_t.shape[1]
        x0, _ = self.to_x0_and_eps(output[:, :channels], x_t, t)
        mean, log_small = self.posterior(x0, x_t, t)
        if self.variance == "learned_range":
            fraction = (output[:, channels:] + 1) / 2
            log_variance = fraction * self._at("log_betas", t, x_t) + (1 - fraction) * log_small
        elif self.variance == "fixed_small":
            log_variance = log_small.expand_as(x_t)
        else:
            log_variance = self._at("log_variance_large", t, x_t).expand_as(x_t)
        return ReverseStep(mean, log_variance, x0)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        latents: Tensor,
        t: Tensor,
        labels: LabelsOrConditions,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of each image, {"loss", "mse", "vb"}, each (N,) float32.

        mse: squared error of the prediction. vb: variational bound in bits per dimension, whose gradient
        reaches the variance channels only. loss: mse, times the weight of `weighting`, plus vb if the variance is
        learned.
        latents, noise: (N, C, H, W). t: (N,) integers from sample_timesteps. labels: (N,), or Conditions.
        Source: iDDPM, section 3.1, with the vb term unscaled as in DiT.
        """
        x_t = self.add_noise(latents, noise, t)
        output = self.predict(model, x_t, t, labels)
        channels = latents.shape[1]
        prediction = output[:, :channels]
        mse = (self.target(latents, noise, t) - prediction).square().flatten(1).mean(1)
        vb = self._variational_bits(
            torch.cat([prediction.detach(), output[:, channels:]], dim=1), latents.float(), x_t, t
        )
        loss = mse if self.weighting == "none" else self._at("loss_weight", t, mse) * mse
        return {"loss": loss + vb if self.variance == "learned_range" else loss, "mse": mse, "vb": vb}

    def _variational_bits(self, output: Tensor, latents: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the term at t of the variational bound of each image, (N,), in bits per dimension (DDPM, eq. 5)."""
        true_mean, true_log_variance = self.posterior(latents, x_t, t)
        step = self.reverse_step(output, x_t, t)
        divergence = gaussian_kl(true_mean, true_log_variance, step.mean, step.log_variance)
        likelihood = discretized_log_likelihood(latents, step.mean, 0.5 * step.log_variance)
        nats = torch.where(t == 0, -likelihood.flatten(1).mean(1), divergence.expand_as(x_t).flatten(1).mean(1))
        return nats / math.log(2)


def _check_shapes(latents: Tensor, noise: Tensor, t: Tensor) -> None:
    if latents.shape != noise.shape or tuple(t.shape) != (len(latents),):
        raise ValueError(
            f"latents are {tuple(latents.shape)}, noise {tuple(noise.shape)} and timesteps {tuple(t.shape)}, expected "
            "noise of the latents' shape. Give one timestep per image"
        )


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence KL(N1 || N2) of normal distributions, element by element, in nats."""
    difference = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (difference.exp() - 1 - difference + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability, in nats, of the bin of width 2/255 around x under N(mean, exp(log_scale)²).

    The outermost bins (|x| > 0.999) extend to infinity. The function is applied to latents too, although they are
    not 8-bit images, because published losses are computed so. Source: DDPM, eq. 13, with iDDPM's tanh approximation
    of the normal distribution function (Page 1977).
    """

    def normal_cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = torch.exp(-log_scale)
    upper = normal_cdf((x - mean + 1 / 255) * inverse_scale)
    lower = normal_cdf((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()  # the lower bound keeps the loss of distant predictions finite


def _betas(schedule: Schedule, num_timesteps: int) -> Tensor:
    """Return the variance added at each step, (num_timesteps,) float64.

    The end points in the papers are for 1000 steps, and are scaled to other numbers of steps.
    """
    scale = 1000 / num_timesteps
    if schedule == "linear":  # DDPM, section 4
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    elif schedule == "scaled_linear":  # Stable Diffusion, U-ViT
        ends = math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012)
        betas = torch.linspace(*ends, num_timesteps, dtype=torch.float64).square()
    else:  # iDDPM, eq. 17
        time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    if betas[-1] >= 1:
        raise InvalidInput(
            f"num_timesteps is {num_timesteps}, with which schedule {schedule!r} removes all signal in one step",
            "a beta below 1 at every step",
            "use more timesteps (1000 as in the paper), or the cosine schedule",
        )
    return betas


def _evenly_spaced(num_timesteps: int, steps: int) -> Tensor:
    if steps == 1:
        return torch.tensor([num_timesteps - 1])
    stride = (num_timesteps - 1) / (steps - 1)
    # Accumulated as in iDDPM rather than multiplied: the two round differently where a sum falls on a half.
    positions = itertools.accumulate(itertools.repeat(stride, steps - 1), initial=0.0)
    return torch.tensor([round(position) for position in positions])


def _strided(num_timesteps: int, steps: int) -> Tensor:
    stride = math.ceil(num_timesteps / steps)
    kept = torch.arange(0, num_timesteps, stride)
    if len(kept) != steps:
        raise InvalidInput(
            f"{steps} steps requested with a constant stride over {num_timesteps} timesteps (stride {stride} gives "
            f"{len(kept)})",
            "a number of steps that a constant stride gives",
            f"choose {len(kept)} steps, or even spacing",
        )
    return kept
