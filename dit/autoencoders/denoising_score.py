"""How well a tiny DiT denoises latents: a measure of how hard they are to learn, before a diffusion model is trained.

    x_t = t latents + (1 - t) noise     velocity = latents - noise     loss = mean squared error of the velocity

The loss on held-out latents is divided by that of the best predictor that sees each value of x_t alone and knows the
mean and variance of its position. The ratio is the share of the error that remains after learning the structure of the
latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.conditions import Conditions
from dit.config import DiTConfig
from dit.flow import FlowMatching
from dit.model import DiT
from raydit.errors import InvalidInput

PROBE = "DiT 96x3, windows of 16, 512 latents, 300 steps of 32"
"""The measurement in a few words: part of protocols, and to be changed with it."""
LATENTS, HELD_OUT_EVERY = 640, 5
"""Most latents that take part, and which share of them is held out: every fifth, 128 of 640."""
MIN_LATENTS = 10
WINDOW = 16
"""Most latent pixels along a side of the central window that takes part, so that the time has a bound."""
WIDTH, DEPTH, HEADS = 96, 3, 3
STEPS, BATCH_SIZE, WARM_UP_STEPS = 300, 32, 30
LEARNING_RATE, MAX_GRAD_NORM = 2e-3, 1.0
TIMES = 16
"""Times at which each held-out latent is denoised: the middles of equal parts of [0, 1]."""


@dataclass(frozen=True)
class DenoisingScore:
    """Mean squared errors of the velocity on held-out latents, over uniform times, per latent value."""

    loss: float
    """Loss of a tiny DiT after a fixed training budget."""
    baseline: float
    """Loss of the best prediction from each value alone; pi / 2 for latents of variance 1."""

    @property
    def ratio(self) -> float:
        """Share of the baseline's error that remains: 1 or more for latents in which nothing could be learned."""
        return self.loss / self.baseline


def central_window(latents: Tensor) -> Tensor:
    """Return the central window of latents (..., h, w) that takes part: at most 16 x 16, of even sides above 8."""
    sides = [min(side, WINDOW) for side in latents.shape[-2:]]
    height, width = (side - side % 2 if side > WINDOW // 2 else side for side in sides)
    top, left = (latents.shape[-2] - height) // 2, (latents.shape[-1] - width) // 2
    return latents[..., top : top + height, left : left + width]


def denoising_score(mean: Tensor, std: Tensor, *, seed: int, device: torch.device | str = "cpu") -> DenoisingScore:
    """Train a tiny DiT on four fifths of some latents, and return its loss on the others beside the baseline's.

    mean, std: (N, C, h, w), of the posteriors of scaled latents; std is 0 for deterministic ones. Training draws from
    them anew at each step. The result depends on the latents, their order and the seed; between devices, and between
    numbers of threads, it differs by rounding. Raises InvalidInput for fewer than 10 latents.
    """
    if len(mean) < MIN_LATENTS:
        raise InvalidInput(f"found {len(mean)} latents", f"at least {MIN_LATENTS}", "give more images")
    mean, std = (central_window(each[:LATENTS]).float().to(device) for each in (mean, std))
    held_out = torch.arange(len(mean), device=device) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    generator = torch.Generator().manual_seed(seed)
    model = _train(mean[~held_out], std[~held_out], generator)
    return _measure(model, (mean[~held_out], std[~held_out]), (mean[held_out], std[held_out]), generator)


def elementwise_velocity(x_t: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the best linear prediction of the velocity from each value of x_t alone, (N, C, h, w).

    x_t: (N, C, h, w). t: (N,). mean, variance: (C, h, w), of the latents. The regression of latents - noise on
    t latents + (1 - t) noise; its mean squared error is variance / (t^2 variance + (1 - t)^2).
    """
    t = t.view(-1, 1, 1, 1)
    slope = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
    return mean + slope * (x_t - t * mean)


def _train(mean: Tensor, std: Tensor, generator: torch.Generator) -> nn.Module:
    """Train by AdamW with warm-up and linear decay; all random numbers come from a generator on the CPU."""
    model, process = _create_model(mean, generator), FlowMatching()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, (STEPS - step) / (STEPS - WARM_UP_STEPS))
    )
    for _ in range(STEPS):
        chosen = torch.randint(len(mean), (BATCH_SIZE,), generator=generator).to(mean.device)
        latents, noise, t = _draw(mean[chosen], std[chosen], generator)
        loss = process.training_losses(model, latents, t, Conditions(None), noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
    return model.eval()


def _create_model(latents: Tensor, generator: torch.Generator) -> nn.Module:
    """Create the tiny DiT for latents (N, C, h, w): at most 64 tokens. Its weights follow from the generator."""
    _, channels, height, width = latents.shape
    config = DiTConfig(
        input_size=(height, width),
        patch_size=2 if min(height, width) > WINDOW // 2 else 1,
        in_channels=channels,
        hidden_size=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        class_dropout_prob=0.0,
        learn_sigma=False,
    )
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiT(config)
    return model.to(latents.device)


@torch.no_grad()
def _measure(
    model: nn.Module,
    training: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> DenoisingScore:
    """Return the losses of the model and of the baseline on held-out latents, for the same times and noises."""
    process, losses = FlowMatching(), []
    average, variance = training[0].mean(dim=0), training[0].var(dim=0) + training[1].square().mean(dim=0)
    for part in range(TIMES):
        latents, noise, _ = _draw(*held_out, generator)
        t = torch.full((len(latents),), (part + 0.5) / TIMES, device=latents.device)
        x_t, velocity = process.add_noise(latents, noise, t), process.velocity(latents, noise)
        predictions = (
            process.predict(model, x_t, t, Conditions(None)),
            elementwise_velocity(x_t, t, average, variance),
        )
        losses.append([float((prediction - velocity).square().double().mean()) for prediction in predictions])
    loss, baseline = (sum(each) / TIMES for each in zip(*losses, strict=True))
    return DenoisingScore(loss, baseline)


def _draw(mean: Tensor, std: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw latents from their posteriors, noises (N, C, h, w), and times (N,)."""
    first, second = (torch.randn(mean.shape, generator=generator).to(mean.device) for _ in range(2))
    return mean + std * first, second, torch.rand(len(mean), generator=generator).to(mean.device)
