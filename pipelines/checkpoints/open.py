"""Open a checkpoint by any of its names: a folder, a URI, an MLflow run or model, a diffusers pipeline, a weights file.

outputs/x/checkpoints/step_0001000      s3://BUCKET/x/checkpoints/step_0001000      file:///...
runs:/RUN  runs:/RUN/step_0001000  (a run's id or name)  models:/NAME@champion  models:/NAME/3  models:/m-...
a DiT pipeline folder of diffusers      a .pt or .safetensors file of the official code
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import storage
from dit.checkpoint import Checkpoint, load_checkpoint
from dit.files import digest_of_files
from dit.formats.completion import COMPLETE, CONFIG, TRAINER, TRAINER_STATE
from dit.formats.digests import parse_digests, parse_recorded
from dit.formats.opened_checkpoint import BASE_COPY, base_is_gone
from dit.formats.record import BaseRecord
from dit.formats.shards import find_index
from pipelines.artifacts import SUPERSEDED, superseded_folders
from pipelines.console import say
from raydit.errors import InvalidInput, NotFound, RayditError, StorageFailed, Unreachable

IN_TRACKING = ("runs:/", "models:/")
"""Prefixes of the names that MLflow resolves."""
ARTIFACTS = ("autoencoder", "latents", "evaluations")
"""Folders of an output by which it is recognised where the folder of its checkpoints has another name."""


@dataclass(frozen=True)
class SharedCheckpoint:
    """What a worker opens a checkpoint by, which may run on another machine."""

    location: str
    """A URI, or a path that the machines must share."""
    imported: Mapping[str, Any] | None = None
    """The recorded options by which weights of another project were opened; None for a checkpoint."""

    def open(self) -> "LocatedCheckpoint":
        """Open the checkpoint. Raises the same errors as `open_checkpoint`."""
        if not storage.exists(self.location):
            raise NotFound(
                f"no checkpoint at {self.location} on {platform.node()}, where a worker runs",
                "a URI, or a path that the machines of all workers share",
                "copy the checkpoint to such a path or URI, and use that instead; one that its training has removed "
                "meanwhile (train.keep_last) is gone everywhere",
            )
        return reopen(self.location, None, self.imported)


@dataclass(frozen=True)
class LocatedCheckpoint(Checkpoint):
    """A checkpoint, and where it was opened from."""

    origin: str
    """Absolute path or URI that was opened. `path` is a local copy if that is a URI or another project's format."""
    is_registered_copy: bool = False
    """Whether `path` is the model registry's copy, with the weights that sample only, because the origin is gone."""
    imported: Mapping[str, Any] | None = None
    """The recorded options by which weights of another project were opened; None for a checkpoint."""

    @classmethod
    def at(cls, origin: str, checkpoint: Checkpoint) -> "LocatedCheckpoint":
        """Add its origin to a checkpoint on the local disk."""
        return cls(checkpoint.path, checkpoint.config, checkpoint.digest, checkpoint.files, origin)

    @property
    def trainer_state(self) -> dict[str, Any]:
        """Content of trainer/state.json at the origin; empty for an imported checkpoint."""
        file = storage.join(self.origin, TRAINER_STATE)
        if not storage.exists(file):
            return {}
        return parse_recorded(storage.read_bytes(file), file, self.files.get(TRAINER_STATE))

    def find_base(self, base: BaseRecord) -> Path:
        """Return the local file of the base's weights: a copy in the folder, at its place, or in the model registry.

        Raises NotFound if it is gone, and InvalidInput if other weights are at its place.
        """
        copy = self.path / BASE_COPY
        return copy if copy.is_file() else find_base(base, self.origin, recorded_store(self))

    @property
    def name(self) -> str:
        """Last part of the origin, such as step_0001000."""
        return storage.split(self.origin)[1]

    @cached_property
    def output(self) -> str:
        """The output folder that it belongs to, also if it was superseded; its parent folder if it lies anywhere else.

        It is that of output/checkpoints/step_N and output/superseded/checkpoints-1/step_N, and of output/NAME/step_N
        if other artifacts lie in output.
        """
        parent = storage.split(self.origin)[0]
        if self.config.get("recipe") is None or _is_root(parent):
            return parent
        above, name = storage.split(parent)
        if storage.split(above)[1] == SUPERSEDED and not _is_root(above):
            return storage.split(above)[0]
        is_output = name == "checkpoints" or any(storage.exists(storage.join(above, each)) for each in ARTIFACTS)
        return above if is_output else parent

    @property
    def shared(self) -> SharedCheckpoint:
        """What workers on other machines open it by.

        Weights of another project are imported again there: the copy of this machine lies in a cache of its own.
        """
        return SharedCheckpoint(str(self.path) if self.is_registered_copy else self.origin, self.imported)


def open_checkpoint(
    name: str | Path | LocatedCheckpoint | SharedCheckpoint,
    *,
    model: str | None = None,
    overrides: tuple[str, ...] = (),
    tracking_uri: str = "",
) -> LocatedCheckpoint:
    """Find a checkpoint by any of its names and open it; one that is remote or in another format is copied to a cache.

    The copy of a remote one lacks trainer/, which only resuming a training needs. name: see the head of this module;
    workers get a SharedCheckpoint, and an open checkpoint is returned as it is. model: published size that official
    weights must have, such as "DiT-XL/2". overrides: recipe overrides; autoencoder.id, objective.kind and model.* state
    what official weights do not record. tracking_uri: MLflow's, as in a recipe. Raises NotFound, InvalidInput, and
    Unreachable if MLflow does not answer.
    """
    if isinstance(name, LocatedCheckpoint):
        return name
    if isinstance(name, SharedCheckpoint):
        return name.open()
    uri = str(name)
    if not uri.startswith(IN_TRACKING):
        return _open(uri, model, overrides)
    from pipelines.checkpoints.registered import open_registered_copy
    from pipelines.tracking.lookup import find_checkpoint

    reference = find_checkpoint(tracking_uri, uri)
    try:
        return open_recorded(uri, reference.location, reference.digest, model, overrides)
    except (NotFound, InvalidInput):
        copy = open_registered_copy(tracking_uri, reference)
        if copy is None:
            raise
        say("checkpoint", f"{uri} is no longer at {reference.location}: using the copy in the model registry")
        return replace(LocatedCheckpoint.at(reference.location, copy), is_registered_copy=True)


def find_base(base: BaseRecord, where: str, store: str) -> Path:
    """Return the local file of the weights that the adapter of a checkpoint changes; a remote one is fetched.

    where: the checkpoint, for messages. store: MLflow's URI, as in a recipe. Raises the same errors as
    `LocatedCheckpoint.find_base`.
    """
    failure: RayditError = base_is_gone(base, where)
    try:
        opened = reopen(base.uri, base.digest, base.imported)
        if opened.files.get(base.file) == base.sha256:
            return opened.path / base.file
        found = opened.files.get(base.file, f"no {base.file}")[:12]
        failure = InvalidInput(
            f"{where} holds an adapter, and its base at {base.uri} has changed: found weights {found}",
            base.sha256[:12],
            f"restore them there, or copy that {base.file} to {where}/{BASE_COPY}",
        )
    except (NotFound, InvalidInput, StorageFailed, Unreachable):
        pass
    copy = _registered_base(base, store)
    if copy is None:
        raise failure
    say("checkpoint", f"the base of {where} is no longer at {base.uri}: using the copy in the model registry")
    return copy


def _registered_base(base: BaseRecord, store: str) -> Path | None:
    """Return the base's weights in a copy that the model registry has; None if it has none, or does not answer."""
    from pipelines.checkpoints.registered import open_registered_copy
    from pipelines.tracking.bases import copies_of_base

    try:
        for reference in copies_of_base(store, base.digest, base.sha256):
            copy = open_registered_copy(store, reference)
            if copy is not None and copy.files.get(base.file) == base.sha256:
                return copy.path / base.file
    except (NotFound, InvalidInput, Unreachable):
        pass
    return None


def recorded_store(opened: LocatedCheckpoint) -> str:
    """Return the tracking URI of a checkpoint's recipe; empty if this user's credentials would be sent to it."""
    from pipelines.tracking.store import gets_credentials

    recorded = str(((opened.config.get("recipe") or {}).get("tracking") or {}).get("uri") or "")
    return "" if recorded and gets_credentials(recorded) else recorded


def open_recorded(
    name: str, location: str, digest: str | None, model: str | None = None, overrides: tuple[str, ...] = ()
) -> LocatedCheckpoint:
    """Open a checkpoint that MLflow recorded, at its location or where its output keeps superseded checkpoints.

    name: for messages. digest: that it must have; None: any. model, overrides: as for `open_checkpoint`. Raises
    NotFound if it is gone, and InvalidInput if another checkpoint is in its place.
    """
    found = find_recorded(location, digest)
    if found != location:
        say("checkpoint", f"{name} was superseded: it lies in {found}")
    opened = _open(found, model, overrides)
    if digest and opened.digest != digest:
        raise InvalidInput(
            f"{name}: the checkpoint at {location} now has the digest {opened.digest[:12]}",
            f"{digest[:12]}, as MLflow recorded it",
            "name the folder itself, or restore the checkpoint that was overwritten",
        )
    return opened


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `open_checkpoint` as a checkpoint records them, for `reopen` in any working directory."""
    from pipelines.checkpoints.importing import with_absolute_autoencoder

    return {"model": options.get("model"), "overrides": with_absolute_autoencoder(options.get("overrides", ()))}


def reopen(location: str, digest: str | None, imported: Mapping[str, Any] | None) -> LocatedCheckpoint:
    """Open a checkpoint that another one refers to, as it was opened then.

    digest: that it had; one that has been superseded is found by it. imported: the recorded options by which a file of
    weights was opened; None for a checkpoint. Raises the same errors as `open_checkpoint`.
    """
    if imported is None:
        return _open(find_recorded(location, digest), None, ())
    return _open(location, imported["model"], tuple(imported["overrides"]))


def find_recorded(location: str, digest: str | None) -> str:
    """Return where a checkpoint that MLflow recorded lies: the location, unless only superseded/ has it.

    location: its path or URI when it was recorded. digest: that it must have; None if it is not known.
    """
    folder, name = storage.split(location)
    output, kind = storage.split(folder)
    if digest is None or not name or _digest_at(location) == digest:
        return location
    others = (storage.join(other, name) for other in reversed(superseded_folders(output, kind)))
    return next((other for other in others if _digest_at(other) == digest), location)


def is_superseded(location: str, digest: str) -> bool:
    """Return whether another checkpoint is where one was recorded, or superseded/ has it.

    location: its path or URI when it was recorded. digest: empty if none was recorded: then it is taken for the one
    that is there. A checkpoint that was only removed is not superseded.
    """
    if not digest:
        return False
    present = _digest_at(location)
    if present is None:
        return find_recorded(location, digest) != location
    return present != digest


def _digest_at(location: str) -> str | None:
    """Return the digest of the checkpoint in a folder; None if it holds no finished one."""
    complete = storage.join(location, COMPLETE)
    return digest_of_files(parse_digests(storage.read_bytes(complete), complete)) if storage.exists(complete) else None


def require_exists(uri: str) -> None:
    """Raise NotFound if nothing is at the path or URI of a checkpoint."""
    if not storage.exists(uri):
        raise NotFound(
            f"no checkpoint at {uri}",
            "a folder such as checkpoints/step_0001000",
            "train one with `raydit train RECIPE`, or name one of a run (runs:/ID) or of the registry "
            "(models:/NAME@champion)",
        )


def _open(uri: str, model: str | None, overrides: tuple[str, ...]) -> LocatedCheckpoint:
    require_exists(uri)
    path = Path(storage.fetch_file(uri) if storage.is_file(uri) else storage.fetch_folder(uri, without=TRAINER))
    origin = str(path) if storage.is_local(uri) else uri
    if path.is_file() or (path / "model_index.json").is_file() or _has_shards(path):
        from pipelines.checkpoints.import_cache import import_once

        options = recorded_options({"model": model, "overrides": overrides})
        opened = LocatedCheckpoint.at(origin, import_once(path, model, tuple(options["overrides"])))
        return replace(opened, imported=options)
    if model is not None:
        raise InvalidInput(
            f"--model {model}: found with {uri}", "weights that do not record their model", "omit --model"
        )
    return LocatedCheckpoint.at(origin, load_checkpoint(path, resumable=storage.is_local(uri)))


def _is_root(folder: str) -> bool:
    """Return whether no folder lies above a path or URI: that of a disk's root, and that of a bucket."""
    above, name = storage.split(folder)
    return not name or ("://" in folder.partition("?")[0] and "://" not in above.partition("?")[0])


def _has_shards(folder: Path) -> bool:
    return not (folder / CONFIG).is_file() and find_index(folder) is not None
