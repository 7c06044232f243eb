"""The training loop: for every batch a step, a report every so often, a checkpoint every so often.

Knows torch and nothing else. Where batches come from, where reports and checkpoints go, and whether `model`
is one copy or a data-parallel one is the caller's business. Nothing in the loop draws random numbers: batches
bring noise, timesteps and dropped labels with them, so that a run can be resumed to the bit.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.distributed import whole
from dit.ema import EMA, PowerEMA
from dit.schedule import TrainingConfig, learning_rate, power_ema_name

Losses = dict[str, Tensor]


class NonFiniteError(FloatingPointError):
    """A gradient is not finite; the weights are as before."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float):
        self.step, self.loss, self.grad_norm, self.lr = step, loss, grad_norm, lr
        super().__init__(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.1e}; expected finite "
            f"numbers. The weights are those of step {step}. Lower learning_rate, or set grad_clip"
        )

    def __reduce__(self):
        return NonFiniteError, (self.step, self.loss, self.grad_norm, self.lr)


def _stop(error: NonFiniteError, batch: Any) -> None:
    raise error


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
    batches: int = 0
    """Batches taken, with those that were left out: where the data go on."""

    @property
    def averages(self) -> dict[str, EMA]:
        """All averages, by the names of their files in a checkpoint."""
        return {"ema": self.ema, **self.power_emas}


def create_state(network: nn.Module, config: TrainingConfig, wrap: Callable = lambda network: network):
    """Start of training: AdamW and averages as `config` asks; `wrap` makes the network data-parallel."""
    model = wrap(network)  # first: it may divide the parameters that the optimizer and the averages are made of
    optimizer = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = EMA(network, decay=config.ema_decay, warmup=config.ema_warmup)
    power_emas = {power_ema_name(sigma_rel): PowerEMA(network, sigma_rel) for sigma_rel in config.ema_sigma_rels}
    return TrainState(network=network, model=model, ema=ema, power_emas=power_emas, optimizer=optimizer)


def train(
    state: TrainState,
    batches: Iterable,
    losses: Callable[[nn.Module, Any], Losses],
    config: TrainingConfig,
    *,
    report: Callable[[int, dict[str, float]], object],
    save: Callable[[TrainState], object],
    on_nonfinite: Callable[[NonFiniteError, Any], None] = _stop,
) -> TrainState:
    """Train until `config.steps`, one step for each of `batches`, and return the state.

    `losses(model, batch)` gives scalars, "loss" among them: the mean over this worker's share of the batch; of a
    part of it (`batch.chunk(config.accumulation_steps)`), the part's contribution to that mean.
    `report(step, metrics)` gets the means since the last report; `save(state)` writes a checkpoint.
    `on_nonfinite(error, batch)` hears of a batch that would have spoilt the weights: it returns to go on without that
    batch, or raises, which it does when left out.
    """
    window = Window(config.global_batch_size)
    batches = window.timed(batches)
    while state.step < config.steps and (batch := next(batches, None)) is not None:
        state.batches += 1
        try:
            metrics = train_step(state, batch, losses, config)
        except NonFiniteError as error:
            on_nonfinite(error, batch)
            continue
        window.add(metrics)
        checkpoint_due = state.step % config.checkpoint_every == 0 or state.step == config.steps
        # At a checkpoint too, so that a resumed run reports the very numbers of an unbroken one.
        if checkpoint_due or state.step % config.log_every == 0:
            report(state.step, window.means())
        if checkpoint_due:
            with window.saving():
                save(state)
    return state


def train_step(state: TrainState, batch, losses, config: TrainingConfig) -> dict[str, Tensor | float]:
    """One optimiser step: forward and backward for every part of the batch, clip, update, average.

    Raises NonFiniteError, with gradients dropped and nothing else changed, if a gradient is not finite.
    """
    lr = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    sums: dict[str, Tensor | float] = {}
    parts = batch.chunk(config.accumulation_steps) if config.accumulation_steps > 1 else [batch]
    for number, part in enumerate(parts, start=1):
        with averaging(state.model, number == len(parts)):
            values = losses(state.model, part)
            values["loss"].backward()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    # Over all workers already: data-parallel gradients are averaged during backward.
    grad_norm = whole(nn.utils.clip_grad_norm_(state.network.parameters(), config.grad_clip or math.inf))
    if not torch.isfinite(grad_norm):
        state.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(state.step, float(sums["loss"]), float(grad_norm), lr)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for average in state.averages.values():
        average.update(state.network, state.step)
    state.step += 1
    return sums | {"lr": lr, "grad_norm": grad_norm}


def averaging(model: nn.Module, last: bool) -> AbstractContextManager:
    """In a data-parallel model, let gradients be averaged over workers with the last part of a batch, not before."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    return nullcontext()


class Window:
    """Means of the metrics since the last report, images per second of all workers, and shares of the time.

    Those are what was waited for data, and for a checkpoint to be taken, which comes after the report of its step.
    """

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.steps = 0
        self.waited = self.saved = 0.0
        self.started = time.perf_counter()

    def timed(self, batches: Iterable) -> Iterator:
        """The same batches; how long each is waited for is counted."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - started
            yield batch

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count how long a checkpoint holds up the steps."""
        started = time.perf_counter()
        yield
        self.saved += time.perf_counter() - started

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        # Sums stay on the device: reading a number every step would make the GPU wait.
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Close the window."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        means["images_per_second"] = self.images_per_step * self.steps / seconds
        means["data_wait"] = self.waited / seconds
        means["checkpoint_wait"] = self.saved / seconds
        self._restart()
        return means
