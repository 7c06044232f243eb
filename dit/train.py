"""The training loop: for every batch a step, a report every so often, a checkpoint every so often.

Knows torch and nothing else. Where batches come from, where reports and checkpoints go, and whether `model`
is one copy or a data-parallel one is the caller's business. Nothing in the loop draws random numbers: batches
bring noise, timesteps and dropped labels with them, so that a run can be resumed to the bit.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit.ema import EMA, PowerEMA
from dit.schedule import TrainingConfig, learning_rate, power_ema_name

Losses = dict[str, Tensor]


@dataclass
class TrainState:
    """All that changes while training, and all that a checkpoint must hold."""

    network: nn.Module
    """The weights that are learned."""
    model: nn.Module
    """What is called in the forward pass: the network, or its data-parallel wrapper."""
    ema: EMA
    optimizer: torch.optim.Optimizer
    power_emas: dict[str, PowerEMA] = field(default_factory=dict)
    """Further averages by their names (`dit.schedule.power_ema_name`)."""
    step: int = 0
    """Finished optimiser steps."""

    @property
    def averages(self) -> dict[str, EMA]:
        """All averages, by the names of their files in a checkpoint."""
        return {"ema": self.ema, **self.power_emas}


def create_state(network: nn.Module, config: TrainingConfig, wrap: Callable = lambda network: network):
    """Start of training: AdamW and averages as `config` asks; `wrap` makes the network data-parallel."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = EMA(network, decay=config.ema_decay, warmup=config.ema_warmup)
    power_emas = {power_ema_name(sigma_rel): PowerEMA(network, sigma_rel) for sigma_rel in config.ema_sigma_rels}
    return TrainState(network=network, model=wrap(network), ema=ema, power_emas=power_emas, optimizer=optimizer)


def train(
    state: TrainState,
    batches: Iterable,
    losses: Callable[[nn.Module, Any], Losses],
    config: TrainingConfig,
    *,
    report: Callable[[int, dict[str, float]], None],
    save: Callable[[TrainState], None],
) -> TrainState:
    """Train until `config.steps`, one step for each of `batches`, and return the state.

    `losses(model, batch)` gives scalars, "loss" among them: the mean over this worker's share of the batch.
    `report(step, metrics)` gets the means since the last report; `save(state)` writes a checkpoint.
    Raises FloatingPointError, naming the step, before a non-finite loss or gradient reaches the weights.
    """
    window = Window(config.global_batch_size)
    for batch in itertools.islice(batches, max(0, config.steps - state.step)):
        metrics = train_step(state, batch, losses, config)
        window.add(metrics)
        if state.step % config.log_every == 0 or state.step == config.steps:
            report(state.step, window.means())
        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            save(state)
    return state


def train_step(state: TrainState, batch, losses, config: TrainingConfig) -> dict[str, Tensor | float]:
    """One optimiser step: forward, backward, clip, update, average."""
    lr = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    values = losses(state.model, batch)
    values["loss"].backward()
    # Over all workers already: data-parallel gradients are averaged during backward.
    grad_norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.grad_clip or math.inf)
    if not torch.isfinite(grad_norm):
        raise FloatingPointError(
            f"step {state.step + 1}: loss {values['loss'].item()}, gradient norm {grad_norm.item()}, learning "
            f"rate {lr:.1e}; expected finite numbers. The weights are those of step {state.step}. Lower "
            "learning_rate, or set grad_clip"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for average in state.averages.values():
        average.update(state.network, state.step)
    state.step += 1
    return {name: value.detach() for name, value in values.items()} | {"lr": lr, "grad_norm": grad_norm}


class Window:
    """Means of the metrics since the last report, and the images per second of all workers."""

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.steps = 0
        self.started = time.perf_counter()

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        # Sums stay on the device: reading a number every step would make the GPU wait.
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def means(self) -> dict[str, float]:
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        means["images_per_second"] = self.images_per_step * self.steps / seconds
        self._restart()
        return means
