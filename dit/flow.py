"""Flow matching on the straight path between noise and data."""

from collections.abc import Callable
from typing import ClassVar, get_args

import torch
from torch import Tensor

from dit.config import ProcessKind, TimeDensity


class FlowMatching:
    """Straight path from noise at t = 0 to data at t = 1; the model predicts the velocity data - noise.

    This is SiT's direction; Flow Matching with t = 1 for noise (SD3, rectified flow in diffusers) is the
    mirror image, and guidance intervals flip with it. The model is given t in [0, 1] as it is.
    Source: Lipman et al. 2022 (https://arxiv.org/abs/2210.02747), Ma et al. 2024 (https://arxiv.org/abs/2401.08740).
    """

    kind: ClassVar[ProcessKind] = "flow"

    def __init__(self, time: TimeDensity = "uniform") -> None:
        """time: density of the training times; logit_normal (mean 0, deviation 1) favours the middle.

        Source of logit_normal: Esser et al. 2024, section 3.1 (https://arxiv.org/abs/2403.03206).
        """
        if time not in get_args(TimeDensity):
            raise ValueError(f"time is {time!r}, but it must be uniform or logit_normal: choose one of them")
        self.time = time

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Map independent uniform numbers (N,) in [0, 1) to training times (N,) float32 in [0, 1]."""
        if self.time == "logit_normal":
            return torch.sigmoid(torch.special.ndtri(uniform.double())).float()
        return uniform.float()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Move latents to time t of the path: t latents + (1 - t) noise.

        latents, noise: (N, C, H, W). t: (N,) in [0, 1]. Raises ValueError if shapes or times do not fit.
        """
        if latents.shape != noise.shape or tuple(t.shape) != (len(latents),):
            raise ValueError(
                f"latents {tuple(latents.shape)}, noise {tuple(noise.shape)} and times {tuple(t.shape)} "
                "do not fit: noise must have the latents' shape; give one time per image"
            )
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(
                f"times run from {float(t.min())} to {float(t.max())}, but the path lies in [0, 1]: "
                "draw them with sample_timesteps"
            )
        t = t.float().view(-1, *[1] * (latents.ndim - 1))
        return t * latents.float() + (1 - t) * noise.float()

    def velocity(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Velocity of the path, which the model learns to predict: latents - noise, (N, C, H, W)."""
        return latents.float() - noise.float()

    def predict(self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The model's velocity (N, C, H, W) float32; a learned sigma's channels are dropped, as in SiT."""
        return model(x_t, t, labels)[:, : x_t.shape[1]].float()

    def training_losses(
        self,
        model: Callable[..., Tensor],
        latents: Tensor,
        t: Tensor,
        labels: Tensor | None,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """Mean squared error of the predicted velocity, per image: {"loss", "mse"}, each (N,) float32.

        latents, noise: (N, C, H, W). t: (N,) from sample_timesteps. labels: (N,).
        """
        prediction = self.predict(model, self.add_noise(latents, noise, t), t, labels)
        mse = (prediction - self.velocity(latents, noise)).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}
