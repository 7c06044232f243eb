"""Exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copy of a model, in float32: parameters are averaged, persistent buffers copied.

    Starts as the model's weights. Give the model itself, not a wrapper that renames parameters
    (DistributedDataParallel, torch.compile), so that the averaged weights carry the model's names.
    Source of the default decay: Peebles & Xie 2022, section 4.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = False) -> None:
        """warmup: shorten the average early in training, to min(decay, (1 + n) / (10 + n)) at step n."""
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}, but it must be in [0, 1): use 0.9999 as in the paper")
        self.decay = decay
        self.warmup = warmup
        parameters, buffers = _parameters_and_buffers(model)
        self._parameters = {name: value.detach().float().clone() for name, value in parameters.items()}
        self._buffers = {name: value.detach().clone() for name, value in buffers.items()}

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimiser step number `step`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the model's present weights: average = decay * average + (1 - decay) * weights."""
        parameters, buffers = _parameters_and_buffers(model)
        current = [parameters[name].float() for name in self._parameters]
        torch._foreach_lerp_(list(self._parameters.values()), current, 1 - self.decay_at(step))
        for name, buffer in self._buffers.items():
            buffer.copy_(buffers[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's names; the model's load_state_dict takes them."""
        return {**self._parameters, **self._buffers}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from averaged weights saved by state_dict.

        Raises ValueError when names or shapes differ from the model's.
        """
        own = self.state_dict()
        different = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
        if different:
            raise ValueError(
                f"averaged weights differ from the model's in {len(different)} entries (as {different[0]}), "
                "but names and shapes must be equal: load a checkpoint of the same model configuration"
            )
        for name, value in own.items():
            value.copy_(state[name])

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the averaged ones, cast to the model's own dtype."""
        model.load_state_dict(self.state_dict())


def _parameters_and_buffers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return parameters, buffers
