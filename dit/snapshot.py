"""A training state held still: whole, on the CPU, apart from the tensors that training changes meanwhile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit.distributed import whole
from dit.train import TrainState


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of a training state."""

    step: int
    batches: int
    """Where the data go on."""
    weights: dict[str, dict[str, Tensor]]
    """State dicts by the names of their files: "model" as trained, "ema" and others averaged."""
    optimizer: dict[str, Tensor]
    """The optimiser's tensors by "<kind>/<parameter's name>", as "exp_avg/blocks.0.attn.qkv.weight"."""


def take_snapshot(state: TrainState, *, keep: bool = True) -> Snapshot | None:
    """Copy what a checkpoint needs. Of a sharded state every process calls it, and one keeps the copy."""
    averages = {name: average.state_dict() for name, average in state.averages.items()}
    weights = {
        name: {key: _copied(tensor, keep) for key, tensor in state_dict.items()}
        for name, state_dict in {"model": state.network.state_dict(), **averages}.items()
    }
    optimizer = {name: _copied(tensor, keep) for name, tensor in _optimizer_tensors(state).items()}
    return Snapshot(state.step, state.batches, weights, optimizer) if keep else None


def _copied(tensor: Tensor, keep: bool) -> Tensor:
    gathered = whole(tensor.detach())  # by all processes, and by most to be dropped at once
    return gathered.to("cpu", copy=True).contiguous() if keep else torch.empty(0)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    # In the parameters' order, which is every process's.
    named = dict(state.network.named_parameters())
    return {
        f"{kind}/{name}": tensor
        for name, parameter in named.items()
        for kind, tensor in state.optimizer.state.get(parameter, {}).items()
    }
