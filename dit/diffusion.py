"""Gaussian diffusion: noise schedules, the posterior, training losses and processes with fewer steps."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from dit.config import Prediction, ProcessKind, Schedule, Variance, Weighting
from dit.parameterizations import View, convert, loss_weight, view, x0_and_eps


class ReverseStep(NamedTuple):
    """The model's Gaussian for the next less noisy latents, p(x_{t-1} | x_t); each (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    """The clean latents that the model sees in x_t."""


class GaussianDiffusion:
    """Forward and reverse process of a diffusion model in num_timesteps steps.

    Tables are float64 on the CPU; whatever is gathered from them is float32, and so are all results.
    Timesteps given to these methods index this process, the model always receives the matching index of
    the full process (`timesteps`), so a spaced process needs no care.
    Sources: DDPM (https://arxiv.org/abs/2006.11239), iDDPM (https://arxiv.org/abs/2102.09672).
    """

    kind: ClassVar[ProcessKind] = "diffusion"

    def __init__(
        self,
        num_timesteps: int = 1000,
        schedule: Schedule = "linear",
        prediction: Prediction = "eps",
        variance: Variance = "learned_range",
        weighting: Weighting = "none",
        min_snr_gamma: float = 5.0,
    ) -> None:
        """prediction: what the network outputs, v as in https://arxiv.org/abs/2202.00512.

        variance: learned_range (2C output channels), or the posterior's (fixed_small) or beta (fixed_large).
        weighting: of the squared error by timestep (`dit.parameterizations.loss_weight`); 5 is the paper's gamma.
        """
        for name, value, choices in (
            ("schedule", schedule, get_args(Schedule)),
            ("prediction", prediction, get_args(Prediction)),
            ("variance", variance, get_args(Variance)),
            ("weighting", weighting, get_args(Weighting)),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(choices)}: choose one of them")
        if min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma is {min_snr_gamma}, but it must be above 0: use 5 as in the paper")
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
        self.sqrt_betas = self.betas.sqrt()
        self.sqrt_one_minus_betas = (1 - self.betas).sqrt()
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self.loss_weight = loss_weight(self.weighting, self.prediction, snr, self.min_snr_gamma)
        # Posterior q(x_{t-1} | x_t, x_0): DDPM eq. 7.
        rest, rest_prev = 1 - alphas_cumprod, 1 - self.alphas_cumprod_prev
        self.posterior_variance = self.betas * rest_prev / rest
        self.posterior_mean_x0 = self.betas * self.alphas_cumprod_prev.sqrt() / rest
        self.posterior_mean_xt = rest_prev * self.sqrt_one_minus_betas / rest
        # The variance of the last step to clean latents is 0; its logarithm is replaced by its neighbour's.
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.log_variance_small = torch.cat([first, self.posterior_variance[1:]]).log()
        self.log_variance_large = torch.cat([first, self.betas[1:]]).log()
        self.log_betas = self.betas.log()
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (N,) of a table, float32, shaped to multiply `like` (N, ...)."""
        return self._gather(name, t).float().view(-1, *[1] * (like.ndim - 1))

    def _gather(self, name: str, t: Tensor) -> Tensor:
        """Entries t (N,) of a table. Raises ValueError if t is out of range; a GPU is not asked, as it would wait.

        Every method that takes timesteps comes here: a negative one would silently count from the end.
        """
        if t.is_floating_point() or (t.device.type == "cpu" and not bool(((t >= 0) & (t < self.num_timesteps)).all())):
            raise ValueError(
                f"timesteps are {t.dtype} from {t.min().item()} to {t.max().item()}, but the process needs "
                f"integers in [0, {self.num_timesteps}): draw them with sample_timesteps"
            )
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).to(t.device)
        return self._on_device[key][t]

    def spaced(self, steps: int, constant_stride: bool = False) -> "GaussianDiffusion":
        """The same process in fewer steps: betas are recomputed from the kept cumulative products.

        Keeps rounded, evenly spaced timesteps with both ends (iDDPM, section 4; one step keeps the last).
        With constant_stride: 0, k, 2k, ... for the smallest k that gives `steps` (DDIM, appendix D.3).
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(
                f"{steps} sampling steps were asked for, but the process has {self.num_timesteps} timesteps: "
                f"choose 1 to {self.num_timesteps}"
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

    def add_noise_step(self, x_prev: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """One step of the forward process, x_{t-1} to x_t: sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise.

        x_prev, noise: (N, C, H, W); at t = 0 x_prev are the clean latents. t: (N,) integers.
        Independent noise at steps 0 to t gives what add_noise gives at t, in distribution.
        Source: Ho et al. 2020, eq. 2. Raises ValueError as add_noise does.
        """
        _check_shapes(x_prev, noise, t)
        keep, add = self._at("sqrt_one_minus_betas", t, x_prev), self._at("sqrt_betas", t, x_prev)
        return keep * x_prev.float() + add * noise.float()

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("sqrt_alphas_cumprod", t, like), self._at("sqrt_one_minus_alphas_cumprod", t, like)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for these latents, noise (N, C, H, W) and timesteps (N,)."""
        return view(self.prediction, latents.float(), noise.float(), *self._alpha_sigma(t, latents))

    def to_x0_and_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latents and noise from the network's prediction, both (N, C, H, W)."""
        return x0_and_eps(self.prediction, prediction, x_t, *self._alpha_sigma(t, x_t))

    def view(self, kind: View, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's prediction seen as "eps", "x0", "v" or "score", (N, C, H, W): see `dit.parameterizations`."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        return convert(prediction, x_t, alpha, sigma, source=self.prediction, target=kind)

    def posterior(self, latents: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C, H, W) and log variance (N, 1, 1, 1) of q(x_{t-1} | x_t, x_0). Source: DDPM, eq. 7."""
        mean_x0, mean_xt = self._at("posterior_mean_x0", t, x_t), self._at("posterior_mean_xt", t, x_t)
        return mean_x0 * latents + mean_xt * x_t, self._at("log_variance_small", t, x_t)

    def predict(self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The model's raw output at timesteps t (N,) of this process, float32.

        Raises ValueError when its channels do not fit the variance.
        """
        output = model(x_t, self._gather("timesteps", t), labels)
        expected = x_t.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"the model returns {output.shape[1]} channels, but variance {self.variance!r} needs "
                f'{expected}: use learn_sigma with "learned_range", and not with the fixed variances'
            )
        return output.float()

    def reverse_step(self, output: Tensor, x_t: Tensor, t: Tensor) -> ReverseStep:
        """The Gaussian p(x_{t-1} | x_t) that the model's raw output describes; x0 is not clipped.

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
        labels: Tensor | None,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """Losses per image, each (N,) float32: {"loss", "mse", "vb"}.

        mse: squared error of the prediction. vb: variational bound in bits per dimension, whose gradient
        reaches the variance channels only. loss = mse, weighted if so set, plus vb with a learned variance.
        latents, noise: (N, C, H, W). t: (N,) integers from sample_timesteps. labels: (N,).
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
        """One term of the variational bound per image (N,), in bits per dimension. Source: DDPM, eq. 5."""
        true_mean, true_log_variance = self.posterior(latents, x_t, t)
        step = self.reverse_step(output, x_t, t)
        divergence = gaussian_kl(true_mean, true_log_variance, step.mean, step.log_variance)
        likelihood = discretized_log_likelihood(latents, step.mean, 0.5 * step.log_variance)
        nats = torch.where(t == 0, -likelihood.flatten(1).mean(1), divergence.expand_as(x_t).flatten(1).mean(1))
        return nats / math.log(2)


def _check_shapes(latents: Tensor, noise: Tensor, t: Tensor) -> None:
    if latents.shape != noise.shape or tuple(t.shape) != (len(latents),):
        raise ValueError(
            f"latents {tuple(latents.shape)}, noise {tuple(noise.shape)} and timesteps {tuple(t.shape)} "
            "do not fit: noise must have the latents' shape; give one timestep per image"
        )


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(N1 || N2) of normal distributions, element by element, in nats."""
    difference = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (difference.exp() - 1 - difference + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of the bin of width 2/255 around x under N(mean, exp(log_scale)²).

    The outermost bins (|x| > 0.999) reach to infinity. Used on latents too, though they are no 8-bit
    images, because published losses are. Source: DDPM, eq. 13, with the tanh approximation of the normal
    distribution function (Page 1977) that iDDPM uses.
    """

    def normal_cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = torch.exp(-log_scale)
    upper = normal_cdf((x - mean + 1 / 255) * inverse_scale)
    lower = normal_cdf((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()  # the floor keeps far-off predictions finite


def _betas(schedule: Schedule, num_timesteps: int) -> Tensor:
    """Variance added at each step (num_timesteps,) float64; the papers' ends are for 1000 steps and scale."""
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
        raise ValueError(
            f"num_timesteps is {num_timesteps}, but schedule {schedule!r} then removes more than all signal "
            "in one step: use more timesteps (1000 as in the paper), or the cosine schedule"
        )
    return betas


def _evenly_spaced(num_timesteps: int, steps: int) -> Tensor:
    if steps == 1:
        return torch.tensor([num_timesteps - 1])
    stride = (num_timesteps - 1) / (steps - 1)
    # Summed up, not multiplied, as in iDDPM: the two differ where a sum falls on a half.
    positions = itertools.accumulate(itertools.repeat(stride, steps - 1), initial=0.0)
    return torch.tensor([round(position) for position in positions])


def _strided(num_timesteps: int, steps: int) -> Tensor:
    stride = math.ceil(num_timesteps / steps)
    kept = torch.arange(0, num_timesteps, stride)
    if len(kept) != steps:
        raise ValueError(
            f"{steps} steps were asked for, but no constant stride over {num_timesteps} timesteps gives them "
            f"(stride {stride} gives {len(kept)}): choose {len(kept)} steps, or even spacing"
        )
    return kept
