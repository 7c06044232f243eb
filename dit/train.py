"""The training loop: one optimizer step per batch, with reports and checkpoints at regular intervals.

The loop depends on torch only. Its caller decides where batches come from, where reports and checkpoints go, and
whether `model` is data-parallel. The loop draws no random numbers: batches contain noise, timesteps and dropped
labels, so that a run can be resumed bit for bit.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.ema import EMA, PowerEMA
from dit.formats.adapter import AdapterConfig
from dit.metrics_window import MetricsWindow, WindowTotals
from dit.optimizer import clip_gradients, parameter_groups
from dit.schedule import TrainingConfig, learning_rate, power_ema_name
from raydit.errors import Diverged

Losses = dict[str, Tensor]


class NonFiniteError(Diverged):
    """A gradient is not finite. The step was not taken, and the weights are unchanged."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float, skipped: int = 1) -> None:
        """skipped: batches without a step since the last one, this one included."""
        self.step, self.loss, self.grad_norm, self.lr, self.skipped = step, loss, grad_norm, lr, skipped
        super().__init__(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.1e}; the weights are still "
            f"those of step {step}",
            "finite numbers",
            "lower learning_rate, or set grad_clip",
        )

    def __reduce__(self) -> tuple[type["NonFiniteError"], tuple[int, float, float, float, int]]:
        return NonFiniteError, (self.step, self.loss, self.grad_norm, self.lr, self.skipped)


def _raise(error: NonFiniteError, batch: Any) -> None:
    raise error


def _unwrapped(network: nn.Module) -> nn.Module:
    return network


def _never() -> bool:
    return False


def default_verdict_lag(device: torch.device) -> int:
    """Return how many further steps are launched before the host asks whether the gradient of one was finite.

    A GPU that the host waits for at every step is idle until the next one is launched. A CPU computes at once.
    """
    return 1 if device.type == "cuda" else 0


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
    """Number of finished optimizer steps."""
    batches: int = 0
    """Number of batches consumed, including skipped ones: the position in the data at which training resumes."""
    skipped: int = 0
    """Number of batches that were skipped since the last step."""
    adapter: AdapterConfig | None = None
    """The low-rank adapter of the network, if that is what is trained."""
    open_window: WindowTotals | None = None
    """What was measured since the last report, where training was stopped between two; None at all other times."""

    @property
    def averages(self) -> dict[str, EMA]:
        """All averages by the names of their files in a checkpoint."""
        return {"ema": self.ema, **self.power_emas}


def create_state(
    network: nn.Module,
    config: TrainingConfig,
    wrap: Callable[[nn.Module], nn.Module] = _unwrapped,
    opponent: nn.Module | None = None,
    lr_multipliers: Mapping[str, float] | None = None,
    adapter: AdapterConfig | None = None,
) -> TrainState:
    """Create the state at the start of training, with AdamW and the averages that `config` describes.

    wrap: makes the network data-parallel. opponent: a part of the network, such as a discriminator, whose gradients are
    clipped on their own, as if it had an optimizer of its own. lr_multipliers: factors of the learning rate by names of
    parameters; 1 for others. adapter: that the network was given (`dit.lora`).
    """
    model = wrap(network)  # first, because it may replace the parameters by shards
    optimizer = torch.optim.AdamW(
        parameter_groups(network, opponent, lr_multipliers or {}),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = EMA(network, decay=config.ema_decay, warmup=config.ema_warmup)
    power_emas = {power_ema_name(sigma_rel): PowerEMA(network, sigma_rel) for sigma_rel in config.ema_sigma_rels}
    return TrainState(
        network=network, model=model, ema=ema, power_emas=power_emas, optimizer=optimizer, adapter=adapter
    )


def train(
    state: TrainState,
    batches: Iterable[Any],
    losses: Callable[[nn.Module, Any], Losses],
    config: TrainingConfig,
    *,
    report: Callable[[int, dict[str, float]], object],
    save: Callable[[TrainState], object],
    validate: Callable[[TrainState], object] | None = None,
    validate_every: int = 1,
    on_nonfinite: Callable[[NonFiniteError, Any], None] = _raise,
    backward: Callable[[Tensor], object] = Tensor.backward,
    stop: Callable[[], bool] = _never,
    verdict_lag: int | None = None,
) -> TrainState:
    """Train until `config.steps`, taking one step for each of `batches`, and return the state.

    losses(model, batch) returns scalars, including "loss": their mean over this worker's share of the global batch.
    For a micro-batch, one of batch.chunk(config.accumulation_steps), it returns the contribution to that mean.
    report(step, metrics) receives the means since the last report. validate(state) is called every `validate_every`
    steps and after the last, before the step's checkpoint, and its time is counted nowhere. save(state) writes a
    checkpoint. on_nonfinite(error, batch) is called for a batch whose gradient is not finite: returning skips the
    batch, raising stops training, with the weights as they were before it. The default raises the error.
    backward(loss) runs the backward pass. stop() is called after every batch; where it returns True, the state is saved
    with `open_window`, unless there is a checkpoint of its step, and returned before `config.steps`.
    A state that was stopped at what is now the last step is reported, validated and saved as that step is.
    verdict_lag: number of steps launched before the host reads whether the gradient of an earlier one was finite
    (see StepQueue); None: `default_verdict_lag`. Results do not depend on it.
    """
    window = MetricsWindow(config.global_batch_size, state.open_window)
    was_stopped, state.open_window = state.open_window is not None, None
    steps = StepQueue(state, losses, config, backward, on_nonfinite)
    lag = default_verdict_lag(_device(state)) if verdict_lag is None else verdict_lag
    first_step = state.step
    # Reporting at checkpoints too makes a resumed run report the same means as an uninterrupted one.
    report_every, save_every = (config.log_every, config.checkpoint_every), (config.checkpoint_every,)
    validations = (validate_every,) if validate else ()

    def due(step: int, intervals: tuple[int, ...]) -> bool:
        return step == config.steps or any(step % interval == 0 for interval in intervals)

    def settle(remaining: int) -> None:
        while len(steps) > remaining:
            metrics = steps.settle()
            if metrics is None:
                continue
            window.add(metrics)
            complete_step()

    def complete_step(*, is_validated: bool = False) -> None:
        if window.steps and due(state.step, report_every):
            report(state.step, window.means())
        if validate is not None and due(state.step, validations) and not is_validated:
            with window.paused():
                validate(state)
        if due(state.step, save_every):
            with window.time_saving():
                save(state)

    if was_stopped and state.step == config.steps:
        complete_step(is_validated=state.step % validate_every == 0)
    timed_batches = window.time_batches(batches)
    while state.step < config.steps and (batch := next(timed_batches, None)) is not None:
        steps.launch(batch)
        # What is due after a step must find the state of that step: no later one may be in flight.
        settle(0 if due(state.step + len(steps), report_every + validations) else lag)
        if state.step < config.steps and stop():
            settle(0)
            if state.step > first_step and not due(state.step, save_every):
                state.open_window = window.totals()
                save(state)
            break
    settle(0)
    return state


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose gradient the host has not looked at, and that a GPU may still be computing."""

    batch: Any
    sums: Losses
    """Sums of the losses over the micro-batches."""
    grad_norm: Tensor
    """Metrics of the step, as tensors on the device."""
    host_grad_norm: "HostCopy"


class StepQueue:
    """Launches optimizer steps, and settles them in the same order, once the host knows their gradient norms.

    A host that asks a GPU at every step whether the gradient is finite waits for it, and the GPU then waits for the
    host. So the device decides: once a gradient is not finite, it leaves weights, optimizer and averages unchanged, in
    that step and in all steps launched after it. When the host settles that step, it launches the later ones again.
    Every step therefore starts from the weights, the learning rate and the decay that it would have if each had been
    settled before the next was launched.
    """

    def __init__(
        self,
        state: TrainState,
        losses: Callable[[nn.Module, Any], Losses],
        config: TrainingConfig,
        backward: Callable[[Tensor], object] = Tensor.backward,
        on_nonfinite: Callable[[NonFiniteError, Any], None] = _raise,
    ) -> None:
        """Arguments are those of `train`."""
        self._state, self._losses, self._config = state, losses, config
        self._backward, self._on_nonfinite = backward, on_nonfinite
        self._launched: deque[LaunchedStep] = deque()
        self._halted = torch.zeros((), device=_device(state))
        """Float32 on the device: 1 from a gradient that is not finite until its step is settled, otherwise 0."""

    def __len__(self) -> int:
        """Return the number of steps that are launched and not settled."""
        return len(self._launched)

    def launch(self, batch: Any) -> None:
        """Launch forward and backward pass of every micro-batch, clipping, and the update of weights and averages."""
        state, step = self._state, self._state.step + len(self)
        sums = self._accumulate_gradients(batch)
        # The norm is that of all workers, because the backward pass has averaged data-parallel gradients.
        grad_norm = clip_gradients(state.optimizer, self._config.grad_clip or math.inf)
        self._halted = torch.maximum(self._halted, (~torch.isfinite(grad_norm)).float())
        for group in state.optimizer.param_groups:
            group["lr"] = group["lr_multiplier"] * learning_rate(self._config, step)
        state.optimizer.found_inf = self._halted  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
        state.optimizer.step()
        del state.optimizer.found_inf  # type: ignore[attr-defined]
        state.optimizer.zero_grad(set_to_none=True)
        for average in state.averages.values():
            average.update(state.network, step, self._halted)
        self._launched.append(LaunchedStep(batch, sums, grad_norm, HostCopy(grad_norm)))

    def settle(self) -> dict[str, Tensor | float] | None:
        """Wait for the earliest step, and count it; return None if its gradient was not finite and it is skipped.

        Otherwise return the sums of the losses over the micro-batches, the learning rate "lr" and the gradient norm
        "grad_norm". What on_nonfinite raises comes with the state as it was before the step, and no step launched.
        """
        state, launched = self._state, self._launched.popleft()
        lr, grad_norm = learning_rate(self._config, state.step), launched.host_grad_norm.read()
        state.batches += 1
        if math.isfinite(grad_norm):
            state.step, state.skipped = state.step + 1, 0
            return {**launched.sums, "lr": lr, "grad_norm": launched.grad_norm}
        without_effect = list(self._launched)
        self._launched.clear()
        self._halted = torch.zeros_like(self._halted)
        state.skipped += 1
        error = NonFiniteError(state.step, float(launched.sums["loss"]), grad_norm, lr, state.skipped)
        self._on_nonfinite(error, launched.batch)
        for later in without_effect:
            self.launch(later.batch)
        return None

    def _accumulate_gradients(self, batch: Any) -> Losses:
        """Run the forward and backward pass of every micro-batch, and return the sums of the losses."""
        count, model = self._config.accumulation_steps, self._state.model
        sums: Losses = {}
        micro_batches = batch.chunk(count) if count > 1 else [batch]
        for number, micro_batch in enumerate(micro_batches, start=1):
            with gradient_all_reduce(model, enabled=number == len(micro_batches)):
                values = self._losses(model, micro_batch)
                self._backward(values["loss"])
            for name, value in values.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        return sums


class HostCopy:
    """A copy of a scalar to the host, which waits for the device only when it is read."""

    def __init__(self, scalar: Tensor) -> None:
        self._copy = scalar.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._copied: torch.cuda.Event | None = None
        if scalar.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(scalar.device))

    def read(self) -> float:
        """Return the scalar, once it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._copy)


def train_step(
    state: TrainState,
    batch: Any,
    losses: Callable[[nn.Module, Any], Losses],
    config: TrainingConfig,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> dict[str, Tensor | float]:
    """Take one optimizer step, wait for it, and return its metrics (see StepQueue).

    Raises NonFiniteError if a gradient is not finite, with gradients dropped and nothing else changed.
    """
    steps = StepQueue(state, losses, config, backward)
    steps.launch(batch)
    metrics = steps.settle()
    assert metrics is not None, "a step is skipped only where on_nonfinite returns"
    return metrics


def _device(state: TrainState) -> torch.device:
    return next(state.network.parameters()).device


def gradient_all_reduce(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Enable or disable the gradient all-reduce of a data-parallel model in the context's backward pass.

    It is enabled for the last micro-batch of a step only. Has no effect on a model that is not data-parallel.
    """
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if enabled else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(enabled)  # type: ignore[operator]
    return nullcontext()
