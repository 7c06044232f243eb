"""Reading of weights files without running code from them, and comparison with what a model expects."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dit.distributed import copy_full_tensor
from dit.formats.foreign_weights import FLOATS, is_dense, no_weights
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file
from raydit.regular_files import open_regular
from raydit.zip_checksums import refuse_damaged_zip

MAX_HEADER = 100_000_000
"""Most bytes of a safetensors file's header, as its own library has it."""
MAX_SHARING = 4
"""Largest ratio of the bytes of all tensors to those of their file: tied weights are saved once."""


def read_weights(file: str | Path) -> dict[str, Any]:
    """Read a safetensors file, or a PyTorch file (.pt, .pth, .ckpt, .bin), to the CPU; its content tells which it is.

    A PyTorch file is a pickle, which can call arbitrary functions when it is opened. Only tensors, plain containers
    and the argparse.Namespace of official training checkpoints are accepted, and nothing is called.
    Raises NotFound, or InvalidInput if the file is damaged or contains anything else.
    """
    file = Path(file)
    if not file.is_file():
        raise NotFound(f"no weights at {file}", "a .safetensors or a PyTorch file (.pt)", "check the path")
    refuse_lfs_pointer_file(file, "the weights")
    refuse_damaged_zip(file)
    try:
        content = load_file(file) if _is_safetensors(file) else _unpickle(file)
    except Exception as error:  # parsers of malformed files raise anything from KeyError to OSError
        raise _unreadable(file, error) from None
    _refuse_more_than_bytes(content, file)
    if not isinstance(content, dict):
        raise InvalidInput(
            f"{file} contains a {type(content).__name__}", "a dict of tensors by name", "save the model's state_dict()"
        )
    if unnamed := [name for name in content if not isinstance(name, str)]:
        raise InvalidInput(
            f"{file} contains a dict with the key {str(unnamed[0])[:80]}, which is not a text",
            "a dict of tensors by name",
            "save the model's state_dict()",
        )
    return content


def read_named(file: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read those of the named tensors that a weights file contains; from a safetensors file, only these are read.

    Raises InvalidInput.
    """
    if not _is_safetensors(file):
        return {name: tensor for name, tensor in read_weights(file).items() if name in names}
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name in names}
    except Exception as error:  # as in read_weights
        raise _unreadable(file, error) from None


def read_metadata(file: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; empty for a file of another format. Raises InvalidInput."""
    refuse_lfs_pointer_file(file, "the weights")
    if not _is_safetensors(file):
        return {}
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except Exception as error:  # as in read_weights
        raise _unreadable(file, error) from None


def _is_safetensors(file: Path) -> bool:
    """Return whether a file is a safetensors file: it begins with the length of a header, which is JSON."""
    with open_regular(file) as opened:
        start = opened.read(9)
    if zipfile.is_zipfile(file):
        return False
    return file.suffix == ".safetensors" or start[8:] == b"{" and int.from_bytes(start[:8], "little") < MAX_HEADER


def _unpickle(file: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        if file.suffix == ".safetensors":  # torch takes the suffix for the format
            with open(file, "rb") as opened:
                return torch.load(opened, map_location="cpu", weights_only=True)
        # Memory-mapped, because a training checkpoint is four times as large as the weights that are read from it.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _refuse_more_than_bytes(content: Any, file: Path) -> None:
    """Raise InvalidInput if tensors claim far more values than the file has bytes for.

    By a stride of 0, and by views of one storage, a file of a kilobyte can hold a table of a terabyte.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content))
    if claimed > MAX_SHARING * file.stat().st_size:
        raise InvalidInput(
            f"{file}: found tensors of {claimed:,} bytes in a file of {file.stat().st_size:,}",
            "the values of every tensor",
            "do not use the file, or save the tensors after .contiguous() where you trust it",
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers, and in containers in these.

    Each container is visited once: where each of a few lists holds the next one many times, the paths are too many.
    """
    seen, waiting = set[int](), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def _unreadable(file: Path, error: Exception) -> InvalidInput:
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return InvalidInput(
            f"{file} refers to {foreign[1]}, which would run code when the file is opened",
            "tensors and plain containers only",
            "ask its author for a state dict, preferably as .safetensors",
        )
    return InvalidInput(
        f"{file} cannot be read ({type(error).__name__})",
        "a .safetensors or a PyTorch file (.pt) with tensors and plain containers only",
        "copy it again, or convert it to .safetensors where you trust it",
    )


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load a state dict into a network, which may be sharded, and return the network.

    Raises InvalidInput, listing the first differences, unless names and shapes equal the network's.
    """
    own = network.state_dict()
    check_weights(own, weights)
    for name, value in own.items():
        copy_full_tensor(value, weights[name])
    return network


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], hint: str = "") -> None:
    """Raise InvalidInput, listing the first differences, unless names and shapes are equal.

    hint: a last line for the message.
    """
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += sorted(name for name in expected.keys() & found.keys() if _shape(expected[name]) != _shape(found[name]))
    if wrong:
        lines = [f"  {name}: {_difference(expected.get(name), found.get(name))}" for name in wrong[:5]]
        headline = f"these weights are of another model; {len(wrong)} entries differ, the first:"
        raise InvalidInput("\n".join([headline, *lines, *([hint] if hint else [])]), "", "")


def _difference(expected: Any, found: Any) -> str:
    both = isinstance(expected, Tensor) and isinstance(found, Tensor)
    transposed = both and found.ndim == 2 and found.shape == expected.shape[::-1]
    return f"found {_shape(found)}{', transposed' if transposed else ''}, expected {_shape(expected)}"


def load_finite(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Load a safetensors file to a device.

    Raises InvalidInput if it is broken, a Git LFS pointer or no regular file, or, naming the tensor, if one is not
    finite.
    """
    refuse_lfs_pointer_file(file, "the weights")
    try:
        weights = load_file(file, device=str(device))
    except SafetensorError as error:
        raise _unreadable(file, error) from None
    check_finite(weights, file, "choose another checkpoint, or copy it again")
    return weights


def check_finite(weights: Mapping[str, Tensor], where: str | Path, do: str = "copy the file again") -> None:
    """Raise InvalidInput, naming the first, for a weight that is NaN or infinite, and for what is no tensor of weights.

    where: the file that they come from. do: what to do about weights that are not finite. Integers are weights here.
    """
    for name, tensor in weights.items():
        if not is_dense(tensor) or tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise no_weights(name, tensor, where)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise InvalidInput(
                f"{where}: the tensor {name} is NaN or infinite in {wrong:,} of its {tensor.numel():,} values",
                "finite weights, because with these a network computes nothing but NaN",
                do,
            )


def _shape(value: Any) -> str:
    if value is None:
        return "nothing"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
