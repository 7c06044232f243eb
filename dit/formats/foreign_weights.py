"""Find a model's weights in another project's file, where they may be inside wrappers, under prefixes, or in half
precision.

Training code saves a state dict bare, or as one entry beside its optimizer, and writes the names that the model has
inside the wrappers of DDP, FSDP and torch.compile. None of that is part of the model, and all of it is removed here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydit.errors import InvalidInput

TRAINED = ("model", "state_dict", "model_state_dict", "module", "net", "network")
"""Entries of a file, and first parts of names, that hold the trained weights; the first that exists is taken."""
AVERAGED = ("ema", "ema_state_dict", "model_ema", "ema_model")
"""Entries of a file, and first parts of names, that hold the averaged weights; the first that exists is taken."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What DDP, torch.compile, FSDP and activation checkpointing put before the names of what they wrap."""
COUNTERS = ("n_averaged",)
"""Entries of torch's AveragedModel that are not weights."""
MAX_DEPTH = 4
"""Wrappers inside each other that are looked into."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that are converted to float32. The values of others mean something only together with scales."""


@dataclass(frozen=True)
class ForeignWeights:
    """The two state dicts of a file, by the model's own names; one object if the file holds only one."""

    model: dict[str, Tensor]
    """The trained weights, or the averaged weights if there are no others."""
    ema: dict[str, Tensor]
    """The averaged weights, or the trained weights if there are no others."""
    taken: tuple[str, ...]
    """What was taken, in words, for whatever differs from a bare state dict."""


def choose_weights(content: Mapping[str, Any], where: object) -> ForeignWeights:
    """Return the trained and the averaged weights among the content of a file.

    where: the file, for messages. Raises InvalidInput for names that are no strings, and if two tensors have one name
    once the names of wrappers are removed.
    """
    paths = _find_states(content)
    averaged, trained = paths["ema"][1], paths["model"][1]
    ema = model = _bare(averaged, "ema", where)
    if trained is not averaged or ema.num_groups > 1:
        model = _bare(trained, "model", where)
    taken = tuple(_describe(content, paths, (ema, model)))
    return ForeignWeights(model.weights, ema.weights, taken)


Found = tuple[tuple[str, ...], Mapping[str, Any]]
"""The names of the entries that lead to a state dict, and the state dict."""


def _find_states(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Found]:
    """Return the state dicts "model" and "ema", which are one if the content names no others."""
    inner = {name: value for name, value in content.items() if isinstance(value, Mapping) and value}
    trained = next((name for name in TRAINED if name in inner), None)
    averaged = next((name for name in AVERAGED if name in inner), None)
    if len(path) == MAX_DEPTH or trained is averaged is None:
        return {"model": (path, content), "ema": (path, content)}
    found = {} if trained is None else _find_states(inner[trained], (*path, trained))
    if averaged is not None:
        found["ema"] = _find_states(inner[averaged], (*path, averaged))["ema"]
    return {"model": found.get("model", found["ema"]), "ema": found["ema"]}


@dataclass(frozen=True)
class _Bare:
    weights: dict[str, Any]
    removed: tuple[str, ...]
    """What was removed from the names, and entries that were left out."""
    num_groups: int = 0
    """Number of state dicts that the names were divided into by their first part; 0 if they have no such part."""


def _bare(state: Mapping[str, Any], which: str, where: object) -> _Bare:
    """Return one of the state dicts by the model's own names. which: "model" or "ema", if names tell them apart."""
    outer = _without_wrappers(state, where)
    groups = _split_groups(outer.weights)
    if not groups:
        return outer
    first = next((name for name, kind in groups if kind == which), next(iter(groups))[0])
    inner = _without_wrappers(next(group for (name, _), group in groups.items() if name == first), where)
    return _Bare(inner.weights, (*outer.removed, f"{first}.", *inner.removed), len(groups))


def _without_wrappers(state: Mapping[Any, Any], where: object) -> _Bare:
    weights: dict[str, Any] = {}
    originals: dict[str, str] = {}
    removed: dict[str, None] = {}
    for original, value in state.items():
        if not isinstance(original, str):
            raise InvalidInput(
                f"{where}: found an entry named {original!r}", "tensors by name", "save the model's state_dict()"
            )
        if original in COUNTERS:
            removed[original] = None
            continue
        name = original
        while wrapper := next((each for each in WRAPPERS if name.startswith(each)), None):
            name = name.removeprefix(wrapper)
            removed[wrapper] = None
        for wrapper in WRAPPERS[1:]:  # compilation and sharding also wrap a model's blocks, one by one
            if f".{wrapper}" in name:
                name = name.replace(f".{wrapper}", ".")
                removed[wrapper] = None
        if name in weights:
            raise InvalidInput(
                f"{where}: found {originals[name]} and {original}, both of which are {name}",
                "one tensor for each name of the model",
                "save the state dict of one model",
            )
        weights[name], originals[name] = value, original
    return _Bare(weights, tuple(removed))


def _split_groups(state: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Divide a state dict by the first part of its names, and remove that, if all names begin with "model" or the like.

    A safetensors file cannot hold a dict in a dict: it has model.NAME and ema.NAME instead. The keys are the first part
    and "model" or "ema". Empty for other names, and where two parts mean the same.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        kind = "model" if first in TRAINED else "ema" if first in AVERAGED else None
        if kind is None or not rest:
            return {}
        groups.setdefault((first, kind), {})[rest] = value
    return groups if len({kind for _, kind in groups}) == len(groups) else {}


def _describe(content: Mapping[str, Any], paths: Mapping[str, Found], states: Sequence[_Bare]) -> Iterator[str]:
    entries = list(dict.fromkeys(".".join(path) for path in (paths["ema"][0], paths["model"][0]) if path))
    if entries:
        chosen = {entry.split(".")[0] for entry in entries}
        left = sorted(str(name) for name in content if name not in chosen)
        yield " and ".join(entries) + (f" (not {', '.join(left[:5])})" if left else "")
    removed = list(dict.fromkeys(name for state in states for name in state.removed))
    if removed:
        yield f"names without {' and '.join(removed)}"


def to_float32(weights: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Return weights in float32, each with memory of its own, as saving them needs.

    where: the file, for messages. Raises InvalidInput, naming the tensor, for integers and other numbers that are not
    weights by themselves, and for tensors without dense values.
    """
    seen: set[int] = set()
    converted = {}
    for name, tensor in weights.items():
        if not is_dense(tensor) or tensor.dtype not in FLOATS:
            raise no_weights(name, tensor, where)
        value = tensor.detach().to(torch.float32)
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        converted[name] = value
    return converted


def is_dense(value: Any) -> bool:
    """Return whether a value is a tensor with dense values in memory."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def no_weights(name: str, value: Any, where: object) -> InvalidInput:
    """Return the error of an entry whose value is no dense tensor, or of another dtype than FLOATS.

    where: the file, for messages.
    """
    kind = str(value.dtype).removeprefix("torch.") if is_dense(value) else "no dense tensor"
    return InvalidInput(
        f"{where}: the tensor {name} is {kind}",
        f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}",
        "save the weights as they were before they were quantised",
    )


def describe_dtypes(weights: Mapping[str, Tensor]) -> list[str]:
    """Return in words which tensors were converted to float32; empty if none was."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values() if isinstance(tensor, Tensor)}
    others = sorted(dtypes - {"float32"})
    return [f"{' and '.join(others)} converted to float32"] if others else []
