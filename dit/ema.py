"""Moving averages of a model's weights: by a constant decay, and by the power functions of Karras et al. 2024."""

import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from dit.distributed import fill
from dit.schedule import LARGEST_SIGMA_REL


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
            fill(value, state[name])

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the averaged ones, cast to the model's own dtype."""
        model.load_state_dict(self.state_dict())


class PowerEMA(EMA):
    """Average over a window that grows with training: its width is sigma_rel of the steps so far.

    The weights after step tau count in proportion to tau^gamma, so the start of training is soon forgotten
    whatever its length. After t steps the average is the sum over n of theta_n (n^(gamma+1) - (n-1)^(gamma+1)) /
    t^(gamma+1). Two of them let any other be made after the training (`dit.posthoc_ema`).
    Source: Karras et al. 2024, section 3.1 (https://arxiv.org/abs/2312.02696).
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        """sigma_rel: standard deviation of the window, as a share of the steps so far; 0.05 and 0.10 in the paper."""
        self.gamma = gamma_of(sigma_rel)
        super().__init__(model)

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimiser step number `step`, which counts from 0."""
        return power_decay(step + 1, self.gamma)


def power_decay(t: int, gamma: float) -> float:
    """Decay of the update that follows the t-th step: (1 - 1/t)^(gamma + 1). Source: Karras et al. 2024, eq. 2."""
    return (1 - 1 / t) ** (gamma + 1)


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile tau^gamma on [0, 1]: sqrt((gamma + 1) / ((gamma + 2)² (gamma + 3))).

    Source: Karras et al. 2024, section 3.1.
    """
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile of standard deviation sigma_rel: the largest root of the cubic in `sigma_rel_of`.

    Raises ValueError outside of (0, 0.288], whose upper end is nearly the uniform average (gamma = 0).
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel is {sigma_rel}, but it must be above 0 and at most {LARGEST_SIGMA_REL}, a uniform average: "
            "use 0.05 and 0.10 as in the paper"
        )
    precision = sigma_rel**-2
    return float(max(Polynomial((12 - precision, 16 - precision, 7, 1)).roots().real))


def _parameters_and_buffers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return parameters, buffers
