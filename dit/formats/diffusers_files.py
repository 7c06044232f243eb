"""The weights files of a diffusers model: one file, a variant such as fp16, or shards that an index lists."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dit.files import digest_of_files, sha256_once
from dit.formats.foreign_weights import describe_dtypes
from dit.formats.shards import list_shards, read_shards
from dit.formats.weights import check_finite, read_named, read_weights
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file
from raydit.zip_checksums import refuse_damaged_zip

WEIGHTS = "diffusion_pytorch_model"
"""File name of the weights in a diffusers folder, without its suffix."""
SUFFIXES = ("safetensors", "bin")


@dataclass(frozen=True)
class DiffusersWeights:
    """The files that hold a model's weights."""

    files: tuple[Path, ...]
    """One file, or all shards in the order of their names."""
    variant: str | None = None
    """What diffusers calls the variant in the files' names, such as "fp16"."""
    index: Path | None = None
    """The file that lists the shards; None for a single file."""

    @property
    def sha256(self) -> str:
        """The file's sha256; of shards, one sha256 over theirs by name (`dit.files.digest_of_files`)."""
        if self.index is None:
            return sha256_once(self.files[0])
        return digest_of_files({file.name: sha256_once(file) for file in self.files})

    @property
    def tensors_sha256(self) -> str:
        """The sha256 of the tensors' names, dtypes, shapes and bytes, in the order of the names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.read().items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def require_size_of(self, kind: Any, config: Mapping[str, Any]) -> None:
        """Raise InvalidInput if a config is of no model, or of one with more values than the files have bytes.

        kind: class of diffusers. What the config claims would be allocated.
        """
        try:
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
        except Exception as error:  # of a config with other values: anything from TypeError to ZeroDivisionError
            found = f"no {kind.__name__} ({type(error).__name__}: {str(error)[:200]})"
        else:
            found = f"the {kind.__name__} of {count:,} weights"
        size = sum(file.stat().st_size for file in self.files)
        if found.startswith("no ") or count > size:
            raise InvalidInput(
                f"{self.files[0].parent}/config.json: found {found}",
                f"one whose weights have room in the {size:,} bytes beside it",
                "copy config and weights again",
            )

    def load(self, kind: Any, config: Mapping[str, Any], dtype: torch.dtype, do: str) -> Any:
        """Load the files as a model of a class of diffusers.

        config: the content of its config.json. do: what to do about files that are broken, that are not the config's,
        or that hold weights that are not finite, for which this raises InvalidInput.
        """
        from diffusers.utils import logging

        self.require_size_of(kind, config)
        for file in self.files:
            refuse_damaged_zip(file)
        logging.disable_progress_bar()  # diffusers shows one for shards, which take a moment
        folder = self.files[0].parent
        try:
            module = kind.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False, variant=self.variant
            )
        except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            found = f"{folder}: found files that diffusers cannot load ({type(error).__name__}: {reason})"
            raise InvalidInput(found, f"the weights of the {kind.__name__} in config.json", do) from error
        check_finite(module.state_dict(), folder, do)
        return module

    def read(self, do: str = "copy the file again") -> dict[str, Any]:
        """Read all tensors to the CPU, without running code from the files.

        do: what to do about weights that are not finite, for which this raises InvalidInput, naming file and tensor.
        """
        if self.index is not None:
            return read_shards(self.index, do)
        tensors = read_weights(self.files[0])
        check_finite(tensors, self.files[0], do)
        return tensors

    def describe(self, tensors: Mapping[str, Tensor]) -> str:
        """Say in words what differs from one file in float32; empty if nothing does. tensors: those that were read."""
        words = [] if self.index is None else [f"the shards of {self.index.name}"]
        words += [] if self.variant is None else [f"the variant {self.variant}"]
        return ", ".join([*words, *describe_dtypes(tensors)])

    def read_named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read those of some tensors that there are; of safetensors files, nothing else. Raises InvalidInput."""
        found: dict[str, Tensor] = {}
        for file in self.files if names else ():
            content = read_named(file, names)
            check_finite(content, file)
            found |= content
        return found


def find_weights(folder: Path) -> DiffusersWeights:
    """Find the weights in a model's folder, as `look_for_weights` does. Raises NotFound if there are none."""
    found = look_for_weights(folder)
    if found is None:
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) if folder.is_dir() else ""
        raise NotFound(
            f"{folder}: found no weights but {names or 'nothing'}",
            f"{WEIGHTS}.safetensors, a variant such as {WEIGHTS}.fp16.safetensors, or shards with their index",
            "check the path",
        )
    return found


def look_for_weights(folder: Path) -> DiffusersWeights | None:
    """Find the weights in a model's folder: a file without variant first, then shards, then a variant; None if none.

    Raises NotFound if a shard is missing, and InvalidInput for a Git LFS pointer.
    """
    found = next(_candidates(folder), None)
    if found is not None and found.index is None:
        _refuse_other_index(folder, found)
    for file in found.files if found else ():
        refuse_lfs_pointer_file(file, "the weights")
    return found


def _refuse_other_index(folder: Path, found: DiffusersWeights) -> None:
    """Raise InvalidInput for an index beside a single file: diffusers would load the shards, whose digest is another.

    found: the weights whose digest counts.
    """
    variant = "" if found.variant is None else f".{found.variant}"
    names = [f"{WEIGHTS}.{suffix}{name}" for suffix in SUFFIXES for name in (f".index{variant}", f"{variant}.index")]
    other = next((index for name in names if (index := folder / f"{name}.json").exists()), None)
    if other is not None:
        raise InvalidInput(
            f"{folder}: found {found.files[0].name} and {other.name}",
            "only one of the two, because their weights may differ",
            "remove the one that you do not want",
        )


def _candidates(folder: Path) -> Iterator[DiffusersWeights]:
    for suffix in SUFFIXES:
        if (file := folder / f"{WEIGHTS}.{suffix}").is_file():
            yield DiffusersWeights((file,))
    for suffix in SUFFIXES:
        if (index := folder / f"{WEIGHTS}.{suffix}.index.json").is_file():
            yield DiffusersWeights(list_shards(index), None, index)
    for suffix in SUFFIXES:
        for file in sorted(folder.glob(f"{WEIGHTS}.*.{suffix}")):
            variant = file.name[len(WEIGHTS) + 1 : -len(suffix) - 1]
            if not re.search(r"-\d+-of-\d+$", variant):
                yield DiffusersWeights((file,), variant)
        for index in sorted(folder.glob(f"{WEIGHTS}.{suffix}.index.*.json")):
            yield DiffusersWeights(list_shards(index), index.name.split(".")[-2], index)
