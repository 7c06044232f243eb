"""How long and how fast to learn: the settings of the training loop, and the learning rate they give.

Free of torch, so that a recipe is validated in milliseconds.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

LARGEST_SIGMA_REL = 0.288
"""Just below 1 / sqrt(12), the relative width of the uniform average over all steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of `dit.train.train`. Defaults are those of Peebles & Xie 2022 (arXiv 2212.09748), section 4."""

    steps: Annotated[int, Gt(0)] = 400_000
    """Optimiser steps in all."""
    global_batch_size: Annotated[int, Gt(0)] = 256
    """Images per step over all workers."""
    accumulation_steps: Annotated[int, Gt(0)] = 1
    """Passes that a step's images are divided into, where memory does not hold them at once."""
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What happens after warm-up: nothing, or a decay to zero at the last step."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up from zero."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay."""
    grad_clip: Annotated[float, Ge(0)] = 0.0
    """Largest gradient norm; 0 clips nothing."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.9999
    """Decay of the averaged weights, which sampling uses."""
    ema_warmup: bool = False
    """Average over a short window first: decay min(ema_decay, (1 + n) / (10 + n)) after n steps."""
    ema_sigma_rels: tuple[Annotated[float, Gt(0), Le(LARGEST_SIGMA_REL)], ...] = ()
    """Relative widths of power-function averages kept besides, each a further copy of the weights; 0.05 and 0.10
    allow to make any other width later (Karras et al. 2024, arXiv 2312.02696)."""
    checkpoint_every: Annotated[int, Gt(0)] = 50_000
    """Steps between checkpoints; the last step is always one."""
    log_every: Annotated[int, Gt(0)] = 100
    """Steps between reports of the loss."""

    def __post_init__(self) -> None:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} is longer than the training (steps = {self.steps}); "
                "lower warmup_steps or raise steps"
            )
        if len(set(self.ema_sigma_rels)) < len(self.ema_sigma_rels):
            raise ValueError(f"ema_sigma_rels = {list(self.ema_sigma_rels)} names a width twice; remove one of them")


def power_ema_name(sigma_rel: float) -> str:
    """Name of a power-function average: of its file in a checkpoint, and in [evaluate] weights."""
    return f"ema_{sigma_rel}"


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the optimiser step that follows `step` finished ones."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate
