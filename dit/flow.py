"""Flow matching on the straight path between noise and data."""

from collections.abc import Callable
from typing import ClassVar, get_args

import torch
from torch import Tensor

from dit.conditions import LabelsOrConditions
from dit.config import ProcessKind, TimeDensity
from dit.time_shift import shift_factor, shift_time
from raydit.errors import InvalidInput


class FlowMatching:
    """Straight path from noise at t = 0 to data at t = 1; the model predicts the velocity data - noise.

    Time runs as in SiT. SD3, and rectified flow in diffusers, count the other way, with noise at t = 1: their times,
    and with them guidance intervals, are 1 - t here. The model receives t in [0, 1].
    Source: Lipman et al. 2022 (https://arxiv.org/abs/2210.02747), Ma et al. 2024 (https://arxiv.org/abs/2401.08740).
    """

    kind: ClassVar[ProcessKind] = "flow"

    def __init__(self, time: TimeDensity = "uniform", time_shift: float | None = None) -> None:
        """Choose how training times are drawn. Raises InvalidInput for an unknown density, or a shift out of range.

        time: density of the training times. "logit_normal" (mean 0, standard deviation 1) favours the middle.
        time_shift: factor by which times of that density are shifted towards noise (`dit.time_shift`); None for none.
        Source of logit_normal: Esser et al. 2024, section 3.1 (https://arxiv.org/abs/2403.03206).
        """
        if time not in get_args(TimeDensity):
            raise InvalidInput(f"time is {time!r}", " or ".join(get_args(TimeDensity)), "choose one of them")
        self.time = time
        self.time_shift = None if time_shift is None else shift_factor(time_shift)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map independent uniform numbers (N,) in [0, 1) to training times (N,) float32 in [0, 1]."""
        t = torch.sigmoid(torch.special.ndtri(uniform.double())) if self.time == "logit_normal" else uniform
        return (t if self.time_shift is None else shift_time(t, self.time_shift)).float()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the point at time t on the path from noise to latents: t latents + (1 - t) noise.

        latents, noise: (N, C, H, W). t: (N,) in [0, 1].
        Raises ValueError if shapes differ, or t (on the CPU) is out of range.
        """
        if latents.shape != noise.shape or tuple(t.shape) != (len(latents),):
            raise ValueError(
                f"latents are {tuple(latents.shape)}, noise {tuple(noise.shape)} and times {tuple(t.shape)}, expected "
                "noise of the latents' shape. Give one time per image"
            )
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(
                f"times range from {float(t.min())} to {float(t.max())}, expected numbers in [0, 1]. "
                "Draw them with sample_timesteps"
            )
        t = t.float().view(-1, *[1] * (latents.ndim - 1))
        return t * latents.float() + (1 - t) * noise.float()

    def velocity(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Return the velocity of the path, which the model is trained to predict: latents - noise, (N, C, H, W)."""
        return latents.float() - noise.float()

    def predict(self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: LabelsOrConditions) -> Tensor:
        """Run the model and return its velocity, (N, C, H, W) float32, without the channels of a learned sigma.

        x_t: (N, C, H, W). t: (N,) in [0, 1]. labels: (N,), or Conditions. SiT drops those channels too.
        """
        return model(x_t, t, labels)[:, : x_t.shape[1]].float()

    def training_losses(
        self,
        model: Callable[..., Tensor],
        latents: Tensor,
        t: Tensor,
        labels: LabelsOrConditions,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """Return the mean squared error of the velocity of each image, as {"loss", "mse"}, each (N,) float32.

        latents, noise: (N, C, H, W). t: (N,) from sample_timesteps. labels: (N,), or Conditions.
        """
        prediction = self.predict(model, self.add_noise(latents, noise, t), t, labels)
        mse = (prediction - self.velocity(latents, noise)).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}
