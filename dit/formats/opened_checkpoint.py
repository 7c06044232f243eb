"""A checkpoint that was opened: what its files say, and its weights, for which an adapter needs those of its base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.files import digest_of_files, sha256_once
from dit.formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterWeights, merge_adapters, read_adapter
from dit.formats.completion import TRAINER_STATE
from dit.formats.digests import read_recorded, require_recorded
from dit.formats.record import BaseRecord, CheckpointRecord
from dit.formats.weights import load_finite
from dit.model import meta_state
from raydit.errors import InvalidInput, NotFound

FROZEN = "frozen.safetensors"
"""File of a checkpoint with an adapter: weights that are not trained, and that differ from the base's."""
BASE_COPY = "base.safetensors"
"""File of the base's weights beside an adapter, so that a copied checkpoint does not depend on the folder in which the
base lies."""


def weights_name(which: str) -> str:
    """Return the name of a weights file without suffix: "model" for "raw", as protocols call it, or else `which`."""
    return "model" if which == "raw" else which


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on a local disk."""

    path: Path
    config: dict[str, Any]
    """Content of config.json; `record` is its typed form."""
    digest: str
    """sha256 over the digests of all files; checkpoints with equal digests are equal."""
    files: Mapping[str, str]
    """sha256 of each file by its name in the folder, as COMPLETE lists them. What is loaded is held against it."""

    @property
    def step(self) -> int:
        """Number of finished optimizer steps. Raises InvalidInput if config.json has none."""
        step = self.config.get("step")
        if not isinstance(step, int):
            raise InvalidInput(f"{self.path}/config.json: found step {str(step)[:80]}", "a number", "copy it again")
        return step

    @property
    def interrupted(self) -> bool:
        """Whether training was stopped here: it resumes from this checkpoint, which the next regular one replaces."""
        return self.config.get("interrupted", False)

    @property
    def record(self) -> CheckpointRecord:
        """What the checkpoint says about itself. Raises InvalidInput if it is not one of a diffusion transformer."""
        try:
            return CheckpointRecord.from_dict(self.config)
        except KeyError as error:
            raise InvalidInput(
                f"{self.path}/config.json has no {error.args[0]!r}",
                "a checkpoint of a diffusion transformer",
                "choose one that `raydit train` or `raydit import` wrote",
            ) from None

    @property
    def trainer_state(self) -> dict[str, Any]:
        """Position in the data, and how random numbers are drawn; empty for an imported checkpoint."""
        return read_recorded(self.path, TRAINER_STATE, self.files) if (self.path / TRAINER_STATE).is_file() else {}

    @property
    def base(self) -> BaseRecord | None:
        """The weights that the checkpoint's adapter changes; None for a checkpoint that holds all of its weights."""
        return BaseRecord.from_dict(self.config["base"]) if "base" in self.config else None

    def weights(self, which: str = "ema", device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Load the averaged ("ema", "ema_0.05") or the trained weights ("raw", or "model") as a state dict.

        An adapter's are those of its base with the adapter's changes. Raises NotFound, listing those that exist, if it
        lacks them, or if the base is gone, and InvalidInput if a file has another digest than was recorded, or if
        weights are not finite.
        """
        names = self.weights_files(which)
        if self.base is None:
            require_recorded(self.path, names[0], self.files, sha256_once)
            return load_finite(self.path / names[0], device)
        merged = merge_adapters(self.unadapted_weights(), [(self.adapter(which), 1.0)], self.path)
        return {name: tensor.to(device) for name, tensor in merged.items()}

    @property
    def weights_names(self) -> set[str]:
        """Names by which `weights` loads: "model" for the trained weights, "ema" and others for averages."""
        if self.base is None:
            return {
                name.removesuffix(".safetensors") for name in self.files if re.fullmatch(r"[^/]+\.safetensors", name)
            }
        folders = (name.removesuffix(f"/{ADAPTER_WEIGHTS}") for name in self.files if name.endswith(ADAPTER_WEIGHTS))
        return {adapter_weights_name(folder) for folder in folders}

    def weights_files(self, which: str = "ema") -> tuple[str, ...]:
        """Return the names of the files in the folder that hold some weights, `which` as for `weights`.

        Raises NotFound, listing those that exist, if it lacks them.
        """
        wanted = self._names(which)
        if all((self.path / each).is_file() for each in wanted):
            return wanted
        raise NotFound(
            f"{self.path} has no weights {which!r}: found {', '.join(sorted(self.weights_names))}",
            "",
            "choose one of them, or train from the start with this average in train.ema_sigma_rels",
        )

    def require_intact(self, which: str = "ema") -> None:
        """Compare the files of some weights with their digests, which reads them, without loading the weights.

        Raises the same errors as `weights`, but that weights may not be finite.
        """
        for name in self.weights_files(which):
            require_recorded(self.path, name, self.files, sha256_once)
        if self.base is not None:
            self._intact_base()

    def weights_sha256(self, which: str = "ema") -> str:
        """Return the digest of some weights: that of their file, or over those of the adapter's files and its base's.

        `which` and errors are as for `weights_files`.
        """
        names = self._names(which)
        if any(name not in self.files for name in names):
            self.weights_files(which)  # raises, and names the weights that the checkpoint has
        if self.base is None:
            return self.files[names[0]]
        return digest_of_files({name: self.files[name] for name in names} | {"base": self.base.sha256})

    def _names(self, which: str) -> tuple[str, ...]:
        name = weights_name(which)
        if self.base is None:
            return (f"{name}.safetensors",)
        frozen = (FROZEN,) if FROZEN in self.files else ()
        return (*(f"{adapter_folder(name)}/{file}" for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)), *frozen)

    def adapter(self, which: str = "ema") -> AdapterWeights:
        """Load the adapter of a checkpoint that has one. Raises the same errors as `weights`."""
        names = self.weights_files(which)
        for name in names:
            require_recorded(self.path, name, self.files, sha256_once)
        return read_adapter((self.path / names[0]).parent)

    def unadapted_weights(self) -> dict[str, Tensor]:
        """Load what the adapter changes: the base's weights, except for those that its training started from otherwise.

        Weights that the adapter holds in full, and that the base has not in their shape, are left out. Raises the same
        errors as `weights`.
        """
        base, expected = self.read_base(), meta_state(self.record.model_config)
        weights = {
            name: base[name] for name, like in expected.items() if name in base and base[name].shape == like.shape
        }
        if FROZEN in self.files:
            require_recorded(self.path, FROZEN, self.files, sha256_once)
            weights |= load_finite(self.path / FROZEN, "cpu")
        return weights

    def read_base(self) -> dict[str, Tensor]:
        """Load the weights of the base. Raises NotFound if it is gone, and InvalidInput if other weights are there."""
        return load_finite(self._intact_base(), "cpu")

    def _intact_base(self) -> Path:
        base = self.base
        assert base is not None, "only a checkpoint with an adapter has a base"
        file = self.find_base(base)
        if (found := sha256_once(file)) != base.sha256:
            raise InvalidInput(
                f"{file}: found weights {found[:12]}",
                f"{base.sha256[:12]}, those of the base that the adapter in {self.path} was trained on",
                "restore them there",
            )
        return file

    def find_base(self, base: BaseRecord) -> Path:
        """Return the local file of the base's weights: a copy in the folder, or at its path. Raises NotFound."""
        origin = Path(base.uri.removeprefix("file://"))
        file = next((each for each in (self.path / BASE_COPY, origin / base.file) if each.is_file()), None)
        if file is not None:
            return file
        if origin.exists() or "://" in str(origin):
            raise NotFound(
                f"{self.path} holds an adapter, and its base {base.uri} is no folder on this disk with {base.file}",
                "the weights that the adapter changes",
                "open it by pipelines.checkpoints.open.open_checkpoint, which also reads weights in other formats and "
                f"at URIs, or copy that {base.file} to {self.path}/{BASE_COPY}",
            )
        raise base_is_gone(base, self.path)


def base_is_gone(base: BaseRecord, where: object) -> NotFound:
    """Return the error of a checkpoint, `where`, whose base is nowhere to be found."""
    return NotFound(
        f"{where} holds an adapter, and its base is gone: no {base.file} of sha256 {base.sha256[:12]} at {base.uri}",
        "the weights that the adapter changes",
        f"restore that checkpoint, or copy its {base.file} to {where}/{BASE_COPY}",
    )


def adapter_folder(name: str) -> str:
    """Return the folder in a checkpoint of the adapter that stands for weights of a name: adapter, adapter_ema."""
    return "adapter" if name == "model" else f"adapter_{name}"


def adapter_weights_name(folder: str) -> str:
    """Return the name of the weights that an adapter's folder in a checkpoint stands for."""
    return folder.removeprefix("adapter_") if folder != "adapter" else "model"
