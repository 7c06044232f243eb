"""Low-rank adapters (LoRA) in peft's layout: adapter_config.json and adapter_model.safetensors in a folder.

For a layer of weight W (out, in) the file holds A (r, in) and B (out, r), under names such as
base_model.model.blocks.0.attn.qkv.lora_A.weight; the adapted layer has the weight W + scale B A, with scale alpha / r.
Parameters that are trained in full are there under their own names, those of their modules in "modules_to_save".
Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit.files import write_json
from dit.formats.adapter_config import check_config, read_header_config
from dit.formats.digests import read_object
from dit.formats.foreign_weights import to_float32
from dit.formats.weights import check_finite, read_weights
from raydit.errors import InvalidInput, NotFound

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CLASSES = "class_names.json"
"""Names of the classes, in a file of its own, as peft drops what it does not know of a config."""
PREFIX = "base_model.model."
"""Prefix that peft adds to the model's names."""
OTHER_PREFIXES = ("transformer.", "")
"""Prefixes that diffusers and other tools use instead."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The low-rank adapter of a model that is trained."""

    rank: int
    """Number of columns of B and rows of A."""
    alpha: float
    """The scale of B A is alpha / rank."""
    layers: tuple[str, ...]
    """Names of the linear layers that have factors."""
    full: tuple[str, ...] = ()
    """Names of the parameters that are trained in full."""
    ambiguous: bool = False
    """Whether names of other layers end with names of these, as those of a wide head's blocks do."""
    frozen: tuple[str, ...] = ()
    """Names of the weights that are not trained, and yet are not those of the base."""


class Factors(NamedTuple):
    """The two factors of the change of one layer's weight, and its scale."""

    down: Tensor
    """A: (r, in)."""
    up: Tensor
    """B: (out, r)."""
    scale: float

    def change(self) -> Tensor:
        """Return scale B A, float64 (out, in)."""
        return self.scale * (self.up.double() @ self.down.double())


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter that was read from a folder; tensors are float32."""

    factors: Mapping[str, Factors]
    """The adapters, by the name of their layer."""
    full: Mapping[str, Tensor]
    """Parameters that replace the base's, by name."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the file, without peft's prefix."""
        named: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            named |= {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": factors.up}
        return {**named, **self.full}


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    weights: Mapping[str, Tensor],
    base: str = "",
    class_names: Sequence[str] = (),
) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it.

    weights: NAME.lora_A.weight and NAME.lora_B.weight for each of the config's layers, and its parameters in full.
    base: path or URI of the base's weights, which is noted; checkpoints note it elsewhere, so that equal adapters are
    equal files wherever their base lies. class_names: of the rows of a table of labels that the adapter has in full,
    which checkpoints note elsewhere as well.
    """
    folder.mkdir(parents=True)
    modules = sorted({name.rpartition(".")[0] for name in config.full} - {""})
    write_json(
        folder / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base or None,
            "r": config.rank,
            "lora_alpha": config.alpha,
            # peft takes a name for every module whose name ends with it, and an expression for whole names.
            "target_modules": "|".join(map(re.escape, config.layers)) if config.ambiguous else list(config.layers),
            "modules_to_save": modules or None,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
    if class_names:
        write_json(folder / ADAPTER_CLASSES, {"class_names": list(class_names)})
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def read_adapter(folder: str | Path) -> AdapterWeights:
    """Read an adapter in the layout of peft, or of diffusers (pytorch_lora_weights.safetensors), running no code.

    Raises NotFound if a file is missing, and InvalidInput for an adapter of another kind, for factors that do not
    belong together, and for weights that are not finite.
    """
    folder = Path(folder)
    config, file = _find_files(folder)
    check_config(config, folder)
    found = read_weights(file)
    weights = to_float32({_own_name(name): value for name, value in found.items()}, file)
    check_finite(weights, file)
    return group_weights(weights, config, file)


def read_class_names(folder: str | Path) -> tuple[str, ...]:
    """Return the names of an adapter's own classes; empty if there is no note of them. Raises the same errors as
    `read_adapter`."""
    file = _find_files(Path(folder))[1].with_name(ADAPTER_CLASSES)
    names = read_object(file).get("class_names") if file.is_file() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"{file}: found class_names {str(names)[:80]}", "a list of texts", "correct it")
    return tuple(names)


def _find_files(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the config, from its file or the header of the weights, or empty, and the file of the weights."""
    names = (ADAPTER_WEIGHTS, "adapter_model.bin", "pytorch_lora_weights.safetensors")
    file = folder if folder.is_file() else next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise NotFound(
            f"{folder}: found no adapter",
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as peft writes them",
            "check the path",
        )
    config = file.with_name(ADAPTER_CONFIG)
    if config.is_file():
        return read_object(config), file
    if file.name.startswith("adapter_model"):
        raise NotFound(f"{folder}: found {file.name} without {ADAPTER_CONFIG}", "both", "copy the folder again")
    return read_header_config(file), file


def _own_name(name: str) -> str:
    """Return the model's own name of a tensor: without what peft and diffusers put before, and the adapter's name."""
    prefix = next(prefix for prefix in (PREFIX, *OTHER_PREFIXES) if name.startswith(prefix))
    return re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", name.removeprefix(prefix))


def group_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> AdapterWeights:
    """Return tensors by the model's names as factors and parameters in full.

    config: content of adapter_config.json, or of the header of diffusers' file. Tensors NAME.alpha come before it, and
    without either, scales are 1. Raises InvalidInput if there are no factors, or if one lacks its other half or has a
    shape that does not fit.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"(.+)\.(?:lora_([AB])\.weight|(alpha))", name):
            pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
        else:
            full[name.replace(".modules_to_save.", ".")] = tensor
    factors = {name: _factors(name, pair, config, where) for name, pair in pairs.items()}
    if not factors:
        first = ", ".join(sorted(weights)[:3]) or "nothing"
        raise InvalidInput(
            f"{where}: found no factors but {first}", "names such as NAME.lora_A.weight", "check that it is an adapter"
        )
    return AdapterWeights(factors, full)


def _factors(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> Factors:
    down, up = pair.get("A"), pair.get("B")
    if down is None or up is None:
        raise InvalidInput(
            f"{where}: found {name} without lora_{'A' if down is None else 'B'}", "both factors", "copy the file again"
        )
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise InvalidInput(
            f"{where}: found factors of {name} of the shapes {tuple(down.shape)} and {tuple(up.shape)}",
            "(r, in) and (out, r), those of a linear layer",
            "choose an adapter of linear layers",
        )
    rank = down.shape[0]
    alpha = pair["alpha"] if "alpha" in pair else _alpha(name, rank, config)
    try:
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError):
        scale = math.nan
    if not math.isfinite(scale):
        raise InvalidInput(
            f"{where}: found lora_alpha {alpha!r} and rank {rank} for {name}", "two numbers", "correct lora_alpha"
        )
    return Factors(down, up, scale)


def _alpha(name: str, rank: int, config: Mapping[str, Any]) -> Any:
    """Return the alpha of a layer by peft's config, whose alpha_pattern has those of single layers."""
    patterns = config.get("alpha_pattern")
    try:
        own = {key: value for key, value in dict(patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)}
    except (TypeError, ValueError, re.error):
        return patterns  # which is no number, and refused
    return next(iter(own.values()), config.get("lora_alpha", rank))


def merge_adapters(
    base: Mapping[str, Tensor], adapters: Sequence[tuple[AdapterWeights, float]], where: object = "the adapter"
) -> dict[str, Tensor]:
    """Return the base's weights with the changes of adapters, each times its share; what none changes to the bit.

    Changes are computed in float64 on the CPU and rounded once, so that no batch, device or number of threads matters.
    where: the adapter, for messages. Raises InvalidInput if one is of another model, or if parameters that are trained
    in full are not in all of them, or the shares of these do not add up to 1.
    """
    merged, changes = dict(base), dict[str, Tensor]()
    for adapter, share in adapters:
        require_fitting(base, adapter, where)
        for name, factors in adapter.factors.items():
            change = share * factors.change()
            changes[name] = changes[name] + change if name in changes else change
    for name, change in changes.items():
        weight = base[f"{name}.weight"]
        # A zero that is added to a negative zero would change its sign.
        merged[f"{name}.weight"] = torch.where(change == 0, weight, (weight.double() + change).to(weight.dtype))
    for name in {name: None for adapter, _ in adapters for name in adapter.full}:
        merged[name] = _mix_full(name, adapters, where)
    return merged


def _mix_full(name: str, adapters: Sequence[tuple[AdapterWeights, float]], where: object) -> Tensor:
    """Return a parameter that is trained in full: the sum of the adapters' by their shares.

    The base's has no part in it, as its rows may be those of other classes. Raises InvalidInput if an adapter has none,
    or another shape, and if the shares do not add up to 1.
    """
    values = [adapter.full.get(name) for adapter, _ in adapters]
    shapes = {None if value is None else value.shape for value in values}
    total = math.fsum(share for _, share in adapters)
    alike = None not in shapes and len(shapes) == 1
    if not alike or abs(total - 1) > 1e-9:
        reason = f"with shares of sum {total:g}" if alike else "not alike in all adapters"
        raise InvalidInput(
            f"{where}: found {name}, which is trained in full, {reason}",
            "one shape in all that is mixed, and shares of sum 1, because the base's may be of other classes",
            "mix adapters of the same classes and resolution, with shares of sum 1",
        )
    if len(adapters) == 1 and values[0] is not None:
        return values[0]
    scaled = [share * value.double() for value, (_, share) in zip(values, adapters, strict=True) if value is not None]
    return torch.stack(scaled).sum(0).to(torch.float32)


def require_fitting(base: Mapping[str, Tensor], adapter: AdapterWeights, where: object) -> None:
    """Raise InvalidInput, naming the first, unless the base has every layer with factors, in its shape.

    base: a state dict, which may be on the meta device.
    """
    shapes = {f"{name}.weight": (len(pair.up), pair.down.shape[1]) for name, pair in adapter.factors.items()}
    for name, shape in shapes.items():
        found = tuple(base[name].shape) if name in base else None
        if found != shape:
            raise InvalidInput(
                f"{where} changes {name} {shape}, and the base has {'no such tensor' if found is None else found}",
                "an adapter of this base",
                "choose the base that it was trained on",
            )


def require_model_of(expected: Mapping[str, Tensor], adapter: AdapterWeights, where: object) -> None:
    """Raise InvalidInput, naming the first, unless a model has all that an adapter changes or replaces, in its shape.

    expected: the model's state dict, which may be on the meta device.
    """
    require_fitting(expected, adapter, where)
    for name, tensor in adapter.full.items():
        found = tuple(expected[name].shape) if name in expected else None
        if found != tuple(tensor.shape):
            raise InvalidInput(
                f"{where} has {name} {tuple(tensor.shape)} beside its factors, and the model of the base has "
                f"{'no such tensor' if found is None else found}",
                "low-rank factors, and parameters in full that the model has",
                "choose the base that it was trained on; of an adapter of other classes, export it again with "
                f"--format peft, which notes them in {ADAPTER_CLASSES}",
            )
