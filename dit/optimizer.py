"""The optimizer's view of a network: groups of parameters with factors of the learning rate, and clipping."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.distributed import gather_full_tensor


def parameter_groups(
    network: nn.Module, opponent: nn.Module | None, lr_multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the optimizer's groups of trained parameters: one for each factor of the learning rate and clipping norm.

    Their entry "lr_multiplier" is the factor; "opponent" says whose gradients are clipped together.
    """
    apart = set(opponent.parameters()) if opponent is not None else set()
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter in apart, lr_multipliers.get(name, 1.0)), []).append(parameter)
    return [{"params": groups[key], "opponent": key[0], "lr_multiplier": key[1]} for key in sorted(groups)]


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Clip the gradients of the network, and separately those of its opponent, to a norm of at most `largest`.

    Return their joint norm before clipping. A network that was not used in the step has no gradients.
    """
    parts: dict[bool, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["opponent"], []).extend(each for each in group["params"] if each.grad is not None)
    groups = parts.values()
    norms = [gather_full_tensor(_clip(group, largest)) for group in groups if group]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _clip(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients to a norm of at most `largest`, and return the norm before; infinity leaves them as they are."""
    if math.isinf(largest):  # spares the pass over all gradients that would multiply them by 1
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, largest)
