"""Training of low-rank adapters (LoRA): which layers get one, and a network of which nothing else is trained.

A linear layer W x becomes W x + (alpha / rank) B A x. A (rank, in) is initialised at random and B (out, rank) to zero,
so that training starts from what the base computes. peft has the layers; the factors take part in averages,
checkpoints and data parallelism as every other parameter does.
Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from dit.distributed import copy_full_tensor
from dit.formats.adapter import AdapterConfig, AdapterWeights
from dit.formats.weights import check_weights
from dit.lora_targets import KINDS
from dit.trained_parameters import match_parameters
from raydit.errors import InvalidInput

FACTOR = re.compile(r"(.+\.lora_[AB])\.default(\.weight)")
"""Names of factors in a network: peft calls an adapter without name "default"."""


def require_peft() -> None:
    """Raise InvalidInput if peft, which has the layers, is not installed for this interpreter."""
    if find_spec("peft") is None:
        raise InvalidInput(
            "train.lora: found no package peft",
            "peft on every node that trains",
            "run `pip install 'raydit[lora]'` there, or remove [train.lora]",
        )


def adapter_config(
    network: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    full: Collection[str] = (),
    frozen: Collection[str] = (),
) -> AdapterConfig:
    """Return the adapter of a network, which may be on the meta device, after checking that it fits.

    targets: words of KINDS, or globs over the names of linear layers. full: names of parameters to train in full.
    frozen: names of weights that are neither trained nor the base's. Raises InvalidInput for a target that no layer
    has, and for a rank above the widths of a layer.
    """
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    chosen: dict[str, None] = {}
    for target in targets:
        chosen |= dict.fromkeys(_layers_of(target, [*linear]))
    # What is trained in full needs no factors.
    layers = tuple(name for name in chosen if not {f"{name}.weight", f"{name}.bias"} & {*full})
    for name in layers:
        largest = min(linear[name].in_features, linear[name].out_features)
        if rank > largest:
            raise InvalidInput(
                f"train.lora.rank: found {rank}",
                f"at most {largest}, the smaller width of {name}: a larger rank changes nothing more",
                "lower it, or choose other targets",
            )
    if not layers:
        raise InvalidInput(
            f"train.lora.targets: found {list(targets)}, all trained in full because the start changed them",
            "layers whose weights the start took over unchanged",
            "add other targets",
        )
    ambiguous = any(other.endswith(f".{name}") for name in layers for other in linear if other not in layers)
    full, frozen = tuple(full), tuple(frozen)
    return AdapterConfig(rank=rank, alpha=alpha, layers=layers, full=full, frozen=frozen, ambiguous=ambiguous)


def _layers_of(target: str, names: Sequence[str]) -> list[str]:
    if target not in KINDS:
        return match_parameters(target, names, "train.lora.targets")
    found = [name for name in names if re.fullmatch(KINDS[target], name)]
    if not found:
        raise InvalidInput(
            f"train.lora.targets: found {target!r}, which matches no layer of this model",
            f"one of {', '.join(KINDS)} of those that this model has, or a glob such as {names[0]!r}",
            "correct train.lora.targets",
        )
    return found


def add_adapter(network: nn.Module, config: AdapterConfig) -> None:
    """Add low-rank factors to a network in place, and freeze all other parameters except those that are trained in
    full.

    network: has the base's weights, and is not yet compiled, nor wrapped for DDP or sharded for FSDP2. Factors are
    drawn by torch's generator.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = "|".join(map(re.escape, config.layers))
    alpha: Any = config.alpha  # peft declares it as an integer, and computes with any number
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=pattern), network)
    full = set(config.full)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(bool(FACTOR.fullmatch(name)) or name in full)


def trained_weights(weights: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Return what is trained, from a state dict of a network with an adapter, by the names in the adapter's file."""
    found = {}
    for name, tensor in weights.items():
        if match := FACTOR.fullmatch(name):
            found[f"{match[1]}{match[2]}"] = tensor
        elif name in config.full:
            found[name] = tensor
    return found


def load_adapter(weights: Mapping[str, Tensor], config: AdapterConfig, adapter: AdapterWeights) -> None:
    """Copy an adapter into what is trained of a state dict, whose tensors may be sharded.

    weights: of a network with the adapter, or its average. Raises InvalidInput if they are of another adapter.
    """
    own, found = trained_weights(weights, config), adapter.tensors
    check_weights(own, found)
    for name, tensor in own.items():
        copy_full_tensor(tensor, found[name])
