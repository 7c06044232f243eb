"""The training loop: one optimiser step per batch, with reports and checkpoints at regular intervals.

The loop depends on torch only. Its caller decides where batches come from, where reports and checkpoints go, and
whether `model` is data-parallel. The loop draws no random numbers: batches contain noise, timesteps and dropped
labels, so that a run can be resumed bit for bit.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.distributed import gather_full_tensor
from dit.ema import EMA, PowerEMA
from dit.metrics_window import MetricsWindow, WindowTotals
from dit.schedule import TrainingConfig, learning_rate, power_ema_name
from raydit.errors import Diverged

Losses = dict[str, Tensor]


class NonFiniteError(Diverged):
    """A gradient is not finite. The step was not taken, and the weights are unchanged."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        self.step, self.loss, self.grad_norm, self.lr = step, loss, grad_norm, lr
        super().__init__(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.1e}; the weights are still "
            f"those of step {step}",
            "finite numbers",
            "lower learning_rate, or set grad_clip",
        )

    def __reduce__(self) -> tuple[type["NonFiniteError"], tuple[int, float, float, float]]:
        return NonFiniteError, (self.step, self.loss, self.grad_norm, self.lr)


def _raise(error: NonFiniteError, batch: Any) -> None:
    raise error


def _unwrapped(network: nn.Module) -> nn.Module:
    return network


def _never() -> bool:
    return False


@dataclass
class TrainState:
    """Everything that changes during training, and that a checkpoint must therefore hold."""

    network: nn.Module
    """The network whose weights are trained."""
    model: nn.Module
    """The module that the forward pass calls: the network, or its data-parallel wrapper."""
    ema: EMA
    """The averaged weights that sampling uses by default."""
    optimizer: torch.optim.Optimizer
    power_emas: dict[str, PowerEMA] = field(default_factory=dict)
    """Additional averages by their names (`dit.schedule.power_ema_name`)."""
    step: int = 0
    """Number of finished optimiser steps."""
    batches: int = 0
    """Number of batches consumed, including skipped ones: the position in the data at which training resumes."""
    open_window: WindowTotals | None = None
    """What was measured since the last report, where training was stopped between two; None at all other times."""

    @property
    def averages(self) -> dict[str, EMA]:
        """All averages by the names of their files in a checkpoint."""
        return {"ema": self.ema, **self.power_emas}


def create_state(
    network: nn.Module, config: TrainingConfig, wrap: Callable[[nn.Module], nn.Module] = _unwrapped
) -> TrainState:
    """Create the state at the start of training, with AdamW and the averages that `config` describes.

    wrap: makes the network data-parallel.
    """
    model = wrap(network)  # first, because it may replace the parameters by shards
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
    batches: Iterable[Any],
    losses: Callable[[nn.Module, Any], Losses],
    config: TrainingConfig,
    *,
    report: Callable[[int, dict[str, float]], object],
    save: Callable[[TrainState], object],
    validate: Callable[[TrainState], object] | None = None,
    on_nonfinite: Callable[[NonFiniteError, Any], None] = _raise,
    backward: Callable[[Tensor], object] = Tensor.backward,
    stop: Callable[[], bool] = _never,
) -> TrainState:
    """Train until `config.steps`, taking one step for each of `batches`, and return the state.

    losses(model, batch) returns scalars, including "loss": their mean over this worker's share of the global batch.
    For a micro-batch, one of batch.chunk(config.accumulation_steps), it returns the contribution to that mean.
    report(step, metrics) receives the means since the last report. validate(state) is called after every step, before
    its checkpoint, and its time is counted nowhere. save(state) writes a checkpoint.
    on_nonfinite(error, batch) is called for a batch whose gradient is not finite: returning skips the batch, raising
    stops training. The default raises the error. backward(loss) runs the backward pass. stop() is called after every
    step; where it returns True, the state is saved with `open_window`, unless this step's checkpoint was regular, and
    returned before `config.steps`.
    """
    window = MetricsWindow(config.global_batch_size, state.open_window)
    state.open_window = None
    timed_batches = window.time_batches(batches)
    while state.step < config.steps and (batch := next(timed_batches, None)) is not None:
        state.batches += 1
        try:
            metrics = train_step(state, batch, losses, config, backward)
        except NonFiniteError as error:
            on_nonfinite(error, batch)
            continue
        window.add(metrics)
        checkpoint_due = state.step % config.checkpoint_every == 0 or state.step == config.steps
        # Reporting at checkpoints too makes a resumed run report the same means as an uninterrupted one.
        if checkpoint_due or state.step % config.log_every == 0:
            report(state.step, window.means())
        if validate is not None:
            with window.paused():
                validate(state)
        if checkpoint_due:
            with window.time_saving():
                save(state)
        if state.step < config.steps and stop():
            if not checkpoint_due:
                state.open_window = window.totals()
                save(state)
            break
    return state


def train_step(
    state: TrainState,
    batch: Any,
    losses: Callable[[nn.Module, Any], Losses],
    config: TrainingConfig,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> dict[str, Tensor | float]:
    """Take one optimiser step: forward and backward pass of every micro-batch, clipping, update, averages.

    Returns the sums of the losses over the micro-batches, the learning rate "lr" and the gradient norm "grad_norm".
    backward(loss) runs the backward pass. Raises NonFiniteError if a gradient is not finite, with gradients dropped and
    nothing else changed.
    """
    lr = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    sums: dict[str, Tensor | float] = {}
    micro_batches = batch.chunk(config.accumulation_steps) if config.accumulation_steps > 1 else [batch]
    for number, micro_batch in enumerate(micro_batches, start=1):
        with gradient_all_reduce(state.model, enabled=number == len(micro_batches)):
            values = losses(state.model, micro_batch)
            backward(values["loss"])
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    # The norm is that of all workers, because the backward pass has averaged data-parallel gradients.
    grad_norm = gather_full_tensor(nn.utils.clip_grad_norm_(state.network.parameters(), config.grad_clip or math.inf))
    if not torch.isfinite(grad_norm):
        state.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(state.step, float(sums["loss"]), float(grad_norm), lr)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for average in state.averages.values():
        average.update(state.network, state.step)
    state.step += 1
    return sums | {"lr": lr, "grad_norm": grad_norm}


def gradient_all_reduce(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Enable or disable the gradient all-reduce of a data-parallel model in the context's backward pass.

    It is enabled for the last micro-batch of a step only. Has no effect on a model that is not data-parallel.
    """
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if enabled else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(enabled)  # type: ignore[operator]
    return nullcontext()
