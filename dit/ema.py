"""Moving averages of weights: with a constant decay, and with the power functions of Karras et al. 2024."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from dit.distributed import copy_full_tensor, local_shard
from dit.schedule import LARGEST_SIGMA_REL
from raydit.errors import InvalidInput


class EMA:
    """Averaged copy of a model's weights in float32: parameters are averaged, persistent buffers copied.

    It starts as a copy of the model's weights. Pass the model itself rather than a wrapper that renames parameters
    (DistributedDataParallel, torch.compile), so that the averaged weights have the model's names.
    Source of the default decay: Peebles & Xie 2022, section 4.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = False) -> None:
        """Copy the model's weights. Raises InvalidInput if decay is out of range.

        decay: weight of the average in an update, in [0, 1).
        warmup: shorten the average early in training, with decay min(decay, (1 + n) / (10 + n)) at step n.
        """
        if not 0 <= decay < 1:
            raise InvalidInput(f"ema_decay is {decay}", "a number in [0, 1)", "use 0.9999 as in the paper")
        self.decay = decay
        self.warmup = warmup
        parameters, buffers = _parameters_and_buffers(model)
        # What is not trained shares its memory with its average, which is equal to it.
        self._parameters = {
            name: value.detach().float().clone() if value.requires_grad else value.detach().float()
            for name, value in parameters.items()
        }
        self._buffers = {name: value.detach().clone() for name, value in buffers.items()}

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after optimizer step number `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, halted: Tensor | None = None) -> None:
        """Update the average with the model's current weights: average = decay * average + (1 - decay) * weights.

        halted: float32 () on the weights' device; where it is 1, the average stays as it is.
        """
        parameters, buffers = _parameters_and_buffers(model)
        weight: Any = 1 - self.decay_at(step)
        if halted is not None:
            # Without a branch, because the host does not know the value; and for each tensor, because functions of
            # lists of tensors take a weight of the host only. Halted, the weights are finite, and a weight of 0 changes
            # nothing but the sign of a zero.
            weight = (1 - halted) * weight
        for name, average in self._parameters.items():
            if parameters[name].requires_grad:  # what is not trained is equal to its average
                local_shard(average).lerp_(local_shard(parameters[name]).float(), weight)
        for name, buffer in self._buffers.items():
            buffer.copy_(buffers[name] if halted is None else torch.where(halted > 0, buffer, buffers[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights by the model's names, ready for the model's load_state_dict."""
        return {**self._parameters, **self._buffers}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Overwrite the average by weights that state_dict returned earlier.

        Raises InvalidInput if names or shapes differ from the model's.
        """
        own = self.state_dict()
        different = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
        if different:
            raise InvalidInput(
                f"averaged weights differ from the model's in {len(different)} entries, such as {different[0]}",
                "equal names and shapes",
                "load a checkpoint of the same model configuration",
            )
        for name, value in own.items():
            copy_full_tensor(value, state[name])

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averaged parameters inside the context, to the bit, and its own ones again after it.

        Needs memory for one parameter at a time. Buffers are equal in both after an update.
        """
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            average = self._parameters[name]
            own = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(own)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the averaged ones, cast to the dtype of the model."""
        model.load_state_dict(self.state_dict())


class PowerEMA(EMA):
    """Average over a window whose width is the share sigma_rel of the steps so far, and so grows with training.

    The weights after step tau count in proportion to tau^gamma, so that the average forgets the start of training.
    After t steps it is the sum over n of theta_n (n^(gamma+1) - (n-1)^(gamma+1)) / t^(gamma+1). From two such
    averages any other can be reconstructed after training (`dit.posthoc_ema`).
    Source: Karras et al. 2024, section 3.1 (https://arxiv.org/abs/2312.02696).
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        """Copy the model's weights. Raises InvalidInput if sigma_rel is out of range.

        sigma_rel: standard deviation of the window, as a share of the steps so far; 0.05 and 0.10 in the paper.
        """
        self.gamma = gamma_from_sigma_rel(sigma_rel)
        super().__init__(model)

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after optimizer step number `step`, counted from 0."""
        return power_decay(step + 1, self.gamma)


def power_decay(t: int, gamma: float) -> float:
    """Return the decay of the update after the t-th step: (1 - 1/t)^(gamma + 1). Source: Karras et al. 2024, eq. 2."""
    return (1 - 1 / t) ** (gamma + 1)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent gamma of the profile tau^gamma on [0, 1] whose standard deviation is sigma_rel.

    It is the largest root of the cubic sigma_rel² (gamma + 2)² (gamma + 3) = gamma + 1.
    Raises InvalidInput outside (0, 0.288], whose upper end is nearly the uniform average (gamma = 0).
    Source: Karras et al. 2024, section 3.1.
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise InvalidInput(
            f"sigma_rel is {sigma_rel}",
            f"a number above 0 and at most {LARGEST_SIGMA_REL}, nearly the uniform average",
            "use 0.05 and 0.10 as in the paper",
        )
    precision = sigma_rel**-2
    return float(max(Polynomial((12 - precision, 16 - precision, 7, 1)).roots().real))


def _parameters_and_buffers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return parameters, buffers
