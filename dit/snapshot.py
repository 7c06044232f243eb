"""A copy of a training state on the CPU, from which a checkpoint is written while training continues."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit.distributed import gather_full_tensor
from dit.formats.adapter import AdapterConfig
from dit.lora import trained_weights
from dit.train import TrainState


@dataclass(frozen=True)
class Snapshot:
    """The part of a training state that a checkpoint holds, as full tensors on the CPU."""

    step: int
    batches: int
    """Number of batches consumed, including skipped ones."""
    weights: dict[str, dict[str, Tensor]]
    """State dicts by the names of their files: "model" for the trained weights, "ema" and others for averages."""
    optimizer: dict[str, Tensor]
    """Tensors of the optimizer by kind and parameter name, such as "exp_avg/blocks.0.attn.qkv.weight"."""
    interrupted: bool = False
    """Whether training was stopped after this step, which has no regular checkpoint."""
    adapter: AdapterConfig | None = None
    """The adapter that is trained; `weights` then hold only what is trained, by the names in its file."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """With an adapter: the weights that are neither trained nor those of the base."""
    skipped: int = 0
    """Number of batches that were skipped since the last step; 0 in a regular checkpoint."""


def take_snapshot(state: TrainState, *, keep: bool = True) -> Snapshot | None:
    """Copy a state to the CPU; return None without keep.

    For a sharded state this is a collective: all processes must call it, and those without keep only take part in
    gathering tensors.
    """
    own, adapter = state.network.state_dict(), state.adapter
    kept = {"model": own, **{name: average.state_dict() for name, average in state.averages.items()}}
    frozen: dict[str, Tensor] = {}
    if adapter is not None:
        kept = {name: trained_weights(each, adapter) for name, each in kept.items()}
        frozen = {name: _copy_to_cpu(own[name], keep) for name in adapter.frozen}
    weights = {
        name: {key: _copy_to_cpu(tensor, keep) for key, tensor in state_dict.items()}
        for name, state_dict in kept.items()
    }
    optimizer = {name: _copy_to_cpu(tensor, keep) for name, tensor in _optimizer_tensors(state).items()}
    interrupted = state.open_window is not None
    if not keep:
        return None
    return Snapshot(state.step, state.batches, weights, optimizer, interrupted, adapter, frozen, state.skipped)


def _copy_to_cpu(tensor: Tensor, keep: bool) -> Tensor:
    gathered = gather_full_tensor(tensor.detach())  # a collective, also for processes that do not keep the result
    return gathered.to("cpu", copy=True).contiguous() if keep else torch.empty(0)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    # In the order of the parameters, which is the same in all processes.
    named = dict(state.network.named_parameters())
    return {
        f"{kind}/{name}": tensor
        for name, parameter in named.items()
        for kind, tensor in state.optimizer.state.get(parameter, {}).items()
    }
