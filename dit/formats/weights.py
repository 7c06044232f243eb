"""Weights files from anywhere: read without running anything in them, and compared with what a model expects."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dit.distributed import fill


def read_weights(file: str | Path) -> dict[str, Any]:
    """Content of a safetensors file, or of a PyTorch file (.pt, .pth, .ckpt, .bin), on the CPU.

    A PyTorch file is a pickle, which could name any function to be called: only tensors, plain containers and the
    argparse.Namespace of the official training checkpoints are let through, and nothing is called.
    Raises FileNotFoundError, or ValueError if the file holds anything else.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}: expected a .safetensors or a PyTorch file (.pt)")
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _unpickle(file)
    except Exception as error:  # the parsers of strangers' bytes raise anything from KeyError to OSError
        raise ValueError(_unreadable(file, error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected tensors by name. Save its state_dict()")
    return content


def _unpickle(file: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        # Mapped, not read: a training checkpoint is four times as large as the weights that are taken from it.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _unreadable(file: Path, error: Exception) -> str:
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"{file} is not read: found {foreign[1]}, which would run code on opening it; expected tensors and plain "
            "containers only. Ask whoever made it for a state dict, best as .safetensors"
        )
    return (
        f"{file} cannot be read ({type(error).__name__}): expected a .safetensors or a PyTorch file (.pt) with "
        "nothing but tensors and plain containers. Copy it again, or convert it to .safetensors where you trust it"
    )


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load a state dict whose names must match exactly; the error lists the first that differ."""
    own = network.state_dict()
    check_weights(own, weights)
    for name, value in own.items():
        fill(value, weights[name])
    return network


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], hint: str = "") -> None:
    """Raise ValueError, listing the first that differ, unless names and shapes are equal; hint ends the message."""
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += sorted(name for name in expected.keys() & found.keys() if _shape(expected[name]) != _shape(found[name]))
    if wrong:
        lines = [
            f"  {name}: found {_shape(found.get(name))}, expected {_shape(expected.get(name))}" for name in wrong[:5]
        ]
        raise ValueError(
            f"these weights are of another model; {len(wrong)} entries differ, the first:\n"
            + "\n".join([*lines, *([hint] if hint else [])])
        )


def _shape(value: Any) -> str:
    if value is None:
        return "nothing"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
