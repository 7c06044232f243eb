"""Settings of the training loop, and the learning rate at each step.

Imports no torch, so that recipes are validated without its start-up time.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from raydit.errors import InvalidInput

LearningRateSchedule = Literal["constant", "linear", "cosine"]
Extension = Literal["constant", "warmup", "planned"]

LARGEST_SIGMA_REL = 0.288
"""Largest relative width of a power-function average: just below 1 / sqrt(12), that of the uniform average."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of `dit.train.train`; the defaults are those of Peebles & Xie 2022 (arXiv 2212.09748), section 4.

    Raises InvalidInput if fields contradict each other.
    """

    steps: Annotated[int, Gt(0)] = 400_000
    """Total number of optimizer steps."""
    global_batch_size: Annotated[int, Gt(0)] = 256
    """Images per step, over all workers."""
    accumulation_steps: Annotated[int, Gt(0)] = 1
    """Micro-batches per step, for gradient accumulation when a step's images do not fit into memory at once."""
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: LearningRateSchedule = "constant"
    """Learning rate after warm-up: constant, or decaying to zero at the last step."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Number of steps of linear warm-up from zero."""
    extension: Extension | None = None
    """Learning rate of a training whose `steps` were raised after its end. "constant": that of the last step before,
    from there on; "warmup": the schedule again, warm-up included, over the steps that were added; "planned": as if the
    new `steps` had been planned from the start, which is a jump after a decay. When left out, as "planned", with a
    notice."""
    earlier_ends: tuple[Annotated[int, Gt(0)], ...] = ()
    """Values that `steps` had before, ascending; needed by the extensions "constant" and "warmup"."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of AdamW."""
    grad_clip: Annotated[float, Ge(0)] = 0.0
    """Norm to which gradients are clipped; 0 disables clipping."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.9999
    """Decay of the averaged weights, which sampling uses."""
    ema_warmup: bool = False
    """Whether the average is shorter early in training: decay min(ema_decay, (1 + n) / (10 + n)) after n steps."""
    ema_sigma_rels: tuple[Annotated[float, Gt(0), Le(LARGEST_SIGMA_REL)], ...] = ()
    """Relative widths of additional power-function averages, each of which takes another copy of the weights; from 0.05
    and 0.10 any other width can be reconstructed after training (Karras et al. 2024, arXiv 2312.02696)."""
    checkpoint_every: Annotated[int, Gt(0)] = 50_000
    """Steps between checkpoints; the last step always writes one."""
    log_every: Annotated[int, Gt(0)] = 100
    """Steps between reports of the metrics."""

    def __post_init__(self) -> None:
        if self.warmup_steps > self.steps:
            raise InvalidInput(
                f"warmup_steps = {self.warmup_steps} is longer than the training",
                f"at most steps = {self.steps}",
                "lower warmup_steps or raise steps",
            )
        self._check_extension()
        if len(set(self.ema_sigma_rels)) < len(self.ema_sigma_rels):
            raise InvalidInput(
                f"ema_sigma_rels = {list(self.ema_sigma_rels)} contains a width twice",
                "different widths",
                "remove one of them",
            )

    def _check_extension(self) -> None:
        ends, uses_ends = self.earlier_ends, self.extension in ("constant", "warmup")
        if bool(ends) != uses_ends:
            raise InvalidInput(
                f"earlier_ends: found {list(ends)} with extension = {self.extension!r}",
                "the steps that were planned before, with extension = 'constant' or 'warmup'",
                "set earlier_ends" if uses_ends else "remove earlier_ends, or set extension",
            )
        bounds = (0, *ends, self.steps)
        shortest = min(end - start for start, end in pairwise(bounds))
        if ends and shortest < max(1, self.warmup_steps):
            warmup = f", {self.warmup_steps} warm-up steps or more apart" if self.warmup_steps > 1 else ""
            raise InvalidInput(
                f"earlier_ends: found {list(ends)} with steps = {self.steps}",
                f"ascending numbers between 0 and steps{warmup}",
                "raise steps, or correct earlier_ends",
            )


def power_ema_name(sigma_rel: float) -> str:
    """Return the name of a power-function average, for its file in a checkpoint and for evaluate.weights."""
    return f"ema_{sigma_rel}"


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of the next optimizer step after `step` finished steps."""
    if config.extension == "constant":
        end = config.earlier_ends[0]
        return _planned_rate(config, end, min(step, end - 1))
    if config.extension == "warmup":
        bounds = (0, *config.earlier_ends, config.steps)
        start, end = next(((start, end) for start, end in pairwise(bounds) if step < end), bounds[-2:])
        return _planned_rate(config, end - start, step - start)
    return _planned_rate(config, config.steps, step)


def _planned_rate(config: TrainingConfig, steps: int, step: int) -> float:
    """Return the learning rate of a schedule over `steps` steps after `step` of them."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate
