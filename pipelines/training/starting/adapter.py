"""Training of a low-rank adapter: what of the start it changes, its first checkpoint, and its network in a worker."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import DiTConfig, UViTConfig
from dit.formats.adapter import AdapterConfig
from dit.formats.opened_checkpoint import FROZEN
from dit.formats.weights import load_finite, load_weights
from dit.lora import adapter_config, add_adapter, require_peft, trained_weights
from dit.model import build_model
from dit.snapshot import Snapshot
from dit.start_weights import TensorFate
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.lora import LoraConfig


def adapter_of(lora: LoraConfig, model: DiTConfig | UViTConfig, changed: Collection[str]) -> AdapterConfig:
    """Return the adapter of a model that a recipe asks for.

    changed: names of the weights that are not those of the base; those of them that a training could train are trained
    in full. Raises InvalidInput if it does not fit the model, or if peft is not installed.
    """
    require_peft()
    with torch.device("meta"):
        network = build_model(model)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return adapter_config(
        network,
        rank=lora.chosen_rank,
        alpha=lora.chosen_alpha,
        targets=lora.chosen_targets,
        full=[name for name in changed if name in trainable],
        frozen=[name for name in changed if name not in trainable],
    )


def changed_names(fates: Collection[TensorFate]) -> list[str]:
    """Return the names of the weights that a start adapted or left fresh, which an adapter's checkpoint must hold."""
    return [each.name for each in fates if each.fate in ("adapted", "fresh")]


def recorded_changes(tensors: Mapping[str, Collection[str]]) -> list[str]:
    """Return the names of `changed_names` from what a checkpoint records of its start (`fates_by_kind`)."""
    return [name.partition(":")[0] for fate in ("adapted", "fresh") for name in tensors.get(fate, ())]


def first_snapshot(
    weights: Mapping[str, Tensor],
    adapter: AdapterConfig,
    model: DiTConfig | UViTConfig,
    seed: int,
    names: Collection[str],
) -> Snapshot:
    """Return the state at step 0: A drawn by the seed, B zero, and what is trained in full as the start has it.

    weights: those that training starts from. names: of the trained weights and all averages.
    """
    network = load_weights(build_model(model), dict(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_adapter(network, adapter)
    trained = {name: tensor.detach().clone() for name, tensor in trained_weights(network.state_dict(), adapter).items()}
    frozen = {name: weights[name].clone() for name in adapter.frozen}
    return Snapshot(0, 0, dict.fromkeys(names, trained), optimizer={}, adapter=adapter, frozen=frozen)


def adapted_network(
    network: nn.Module, lora: LoraConfig, model: DiTConfig | UViTConfig, newest: LocatedCheckpoint
) -> AdapterConfig:
    """Give a worker's network the base's weights, and factors whose values a checkpoint's then replace.

    newest: the checkpoint that training resumes from. Returns the adapter. Raises NotFound if the base is gone, and
    InvalidInput if other weights are in its place.
    """
    weights = newest.unadapted_weights()
    held = newest.adapter("model").full
    load_weights(network, weights | dict(held))
    frozen = [*load_finite(newest.path / FROZEN, "cpu")] if FROZEN in newest.files else []
    adapter = adapter_of(lora, model, [*held, *frozen])
    add_adapter(network, adapter)
    return adapter


def require_base(newest: LocatedCheckpoint) -> None:
    """Raise NotFound or InvalidInput before any work if the base of a checkpoint's adapter cannot be found."""
    if (base := newest.base) is not None:
        newest.find_base(base)


def describe_adapter(adapter: AdapterConfig, trained: int, total: int) -> str:
    """Return in words what an adapter trains. trained, total: numbers of parameters of it and of its base."""
    scale = adapter.alpha / adapter.rank
    return (
        f"an adapter of rank {adapter.rank} and scale {scale:g} on {len(adapter.layers)} layers: {trained:,} "
        f"parameters, beside {total:,} of the base"
    )


def trained_names(adapter: AdapterConfig) -> list[str]:
    """Return the names, in a network with an adapter, of the parameters that are trained."""
    factors = [f"{layer}.lora_{factor}.default.weight" for layer in adapter.layers for factor in "AB"]
    return [*factors, *adapter.full]


def adapter_size(adapter: AdapterConfig, model: DiTConfig | UViTConfig) -> tuple[int, int]:
    """Return how many numbers an adapter trains, and how many parameters its model has."""
    with torch.device("meta"):
        network = build_model(model)
    parameters: dict[str, Any] = dict(network.named_parameters())
    factors = (parameters[f"{name}.weight"] for name in adapter.layers)
    trained = sum(adapter.rank * (weight.shape[0] + weight.shape[1]) for weight in factors)
    trained += sum(parameters[name].numel() for name in adapter.full)
    return trained, sum(parameter.numel() for parameter in parameters.values())
