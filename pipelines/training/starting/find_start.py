"""Find the checkpoint that a training starts from, or what the training's own checkpoints record of it."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from dit.autoencoders.latent_scale import LatentScale, scale_of
from dit.config import ProcessKind
from dit.formats.record import CheckpointRecord
from pipelines.artifacts import superseded_folders
from pipelines.checkpoints.adapters import base_record
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import LocatedCheckpoint, reopen
from pipelines.checkpoints.open_start import import_options, open_start, refuse_misdescribed, require_same_latents
from pipelines.config.recipe import Recipe
from pipelines.config.start import StartConfig
from pipelines.config.training import TrainConfig
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset
from raydit.errors import InvalidInput, NotFound, RayditError


@dataclass(frozen=True)
class TrainingStart:
    """The weights that a training starts from."""

    settings: StartConfig
    sha256: str
    """Digest of the file of weights."""
    record: CheckpointRecord
    """Record of the start; of the training's own newest checkpoint, which agrees with it, where the start is gone."""
    opened: LocatedCheckpoint | None
    """The start; None if it is gone, and the training resumes from its own checkpoints."""
    missing: RayditError | None = None
    """Why the start could not be opened; None if it was."""
    imported: Mapping[str, Any] = field(default_factory=dict)
    """Options of `open_checkpoint` with which a weights file was opened."""
    moved: str = ""
    """That the recipe's name of the start means another checkpoint now, in words; empty if it does not."""
    earlier: Mapping[str, Any] | None = None
    """Record of the start of the training that this one continues with new data; None if there is none."""

    def require_usable(self, config: TrainConfig) -> None:
        """Raise NotFound, InvalidInput or Unreachable unless a training can begin with the weights of the start."""
        opened = self.require_opened()
        if config.lora is not None:
            base_record(opened, self.settings.chosen_weights)

    def require_opened(self) -> LocatedCheckpoint:
        """Return the start. Raises why it could not be opened, so that nothing begins with its weights."""
        if self.opened is not None:
            return self.opened
        assert self.missing is not None, "whoever continues without the start knows why"
        raise self.missing

    def scale_for(self, latents: LatentDataset) -> LatentScale:
        """Return the scale of the latents that the training uses: that of the start, if its autoencoder is the same.

        Raises InvalidInput for latents of another autoencoder, unless both ends of the model are reset.
        """
        if self.opened is None:
            return self.record.autoencoder.scale
        same = require_same_latents(self.opened, self.settings, latents.autoencoder, str(latents.path))
        return self.record.autoencoder.scale if same else scale_of(latents.autoencoder)

    def identity(self, latents: LatentDataset, kind: ProcessKind) -> dict[str, Any]:
        """Return what the training depends on: never where the start lies. kind: of its process. Raises the same errors
        as `scale_for`.

        The objective of a file of weights, which its digest does not imply, decides whether the embedding of timesteps
        is kept where the objective is reset.
        """
        scale = self.scale_for(latents)
        chosen: dict[str, Any] = {
            name: list(value) for name in ("reset", "freeze") if (value := getattr(self.settings, name))
        }
        own = self.settings.objective or "diffusion"
        if self.settings.model is not None and "objective" in self.settings.reset and own != kind:
            chosen["objective"] = own
        other_scale = {} if scale == scale_of(latents.autoencoder) else {"scale": scale.to_json()}
        return {"sha256": self.sha256, **chosen, **other_scale}


def find_start(config: Recipe) -> TrainingStart | None:
    """Find the checkpoint that a recipe's training starts from; None if it starts from random weights.

    A training that has checkpoints of its own, which may be superseded, resumes without the start if that is gone or
    damaged. If the recipe names the start by an alias or a run, which may mean another checkpoint by now, it resumes
    with the one that it began with. Raises NotFound, InvalidInput, and Unreachable otherwise.
    """
    settings = config.train.start
    if settings is None:
        return None
    folder = config.folder("checkpoints")
    try:
        opened = open_start(settings, autoencoder_of(config), config.tracking.uri)
    except RayditError as error:
        if isinstance(error, InvalidInput):
            refuse_misdescribed(settings)  # says what is wrong with the recipe, if that is it
        own = _own_record(folder, settings)
        if own is None or own.start is None:
            raise
        return TrainingStart(settings, first_start(own.start)["sha256"], own, None, error)
    sha256 = opened.weights_sha256(settings.chosen_weights)
    if is_moving_name(str(settings.checkpoint)) and (began := _moved_start(folder, settings, opened, sha256)):
        return began
    if _is_within(opened.origin, folder):
        raise InvalidInput(
            f"train.start.checkpoint: found {opened.origin}, which this training would replace",
            "a checkpoint of another output",
            "set another output; with new data, use `raydit train RECIPE --accept-new-data` and no train.start",
        )
    imported = import_options(settings, autoencoder_of(config))
    start = TrainingStart(settings, sha256, opened.record, opened, imported=imported)
    if config.train.lora is not None and _own_record(folder, settings) is None:
        start.require_usable(config.train)  # only a base of an adapter can be opened and yet be of no use
    return start


def _moved_start(folder: str, settings: StartConfig, now: LocatedCheckpoint, sha256: str) -> TrainingStart | None:
    """Return the start that a training began with, if its name means another checkpoint now; None if it does not.

    folder: of the training's checkpoints. now: what the name means now. sha256: of its weights.
    """
    own = _own_record(folder, settings)
    if own is None or own.start is None or (began := first_start(own.start))["sha256"] == sha256:
        return None
    origin = began["checkpoint"]
    moved = f"{settings.checkpoint} is {now.origin} now; this training began with {origin}"
    try:
        imported = began.get("imported")
        opened = reopen(origin, began.get("digest"), imported)
        if opened.weights_sha256(settings.chosen_weights) == began["sha256"]:
            return TrainingStart(settings, began["sha256"], opened.record, opened, imported=imported or {}, moved=moved)
    except RayditError:
        pass
    gone = NotFound(
        f"train.start.checkpoint: {moved}, which is gone",
        "the checkpoint that it began with",
        "restore it, or set another output to start from the present one",
    )
    return TrainingStart(settings, began["sha256"], own, None, gone, moved=moved)


def is_moving_name(name: str) -> bool:
    """Return whether a checkpoint's name may mean another one later: an alias, or the newest checkpoint of a run."""
    return (name.startswith("models:/") and "@" in name) or (
        name.startswith("runs:/") and "/" not in name.removeprefix("runs:/")
    )


def _is_within(location: str, folder: str) -> bool:
    """Return whether a checkpoint lies in a folder, symbolic links followed."""
    parent = storage.split(location)[0]
    if storage.is_local(parent) and storage.is_local(folder):
        return os.path.realpath(storage.local_path(parent)) == os.path.realpath(storage.local_path(folder))
    return parent == folder


def _own_record(folder: str, settings: StartConfig) -> CheckpointRecord | None:
    """Return the record of a training's newest checkpoint, if it started from the checkpoint that the recipe names.

    folder: of the training's checkpoints. It comes before superseded ones, and of these the newest comes first.
    """
    for each in (folder, *reversed(superseded_folders(*storage.split(folder)))):
        checkpoints = CheckpointFolder(each)
        record = _newest_record(checkpoints)
        if record is None:
            continue
        recorded = ((record.recipe or {}).get("train") or {}).get("start") or {}
        same_name = _absolute(recorded.get("checkpoint")) == _absolute(settings.checkpoint)
        if same_name and (recorded.get("weights") or "ema") == settings.chosen_weights:
            return record
    return None


def _newest_record(checkpoints: CheckpointFolder) -> CheckpointRecord | None:
    """Return the record of the newest checkpoint in a folder that has one which can be read; None if none has."""
    for step in reversed(checkpoints.all_steps()):
        with contextlib.suppress(InvalidInput):
            return checkpoints.describe(step).record
    return None


def first_start(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record of the checkpoint that a recipe names, before any new data were accepted."""
    while "earlier" in recorded:
        recorded = recorded["earlier"]
    return recorded


def _absolute(name: str | None) -> str | None:
    return storage.absolute(name) if name and storage.is_local(name) else name
