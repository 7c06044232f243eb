"""Checkpoints by any of their names: a folder, a URI, an MLflow run or model, a diffusers pipeline, an official file.

outputs/x/checkpoints/step_0001000      s3://BUCKET/x/checkpoints/step_0001000      file:///...
runs:/RUN_ID  runs:/RUN_ID/step_0001000  models:/NAME@champion  models:/NAME/3  models:/m-...
a DiT pipeline folder of diffusers      a .pt or .safetensors file of the official code
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cluster import storage
from dit.checkpoint import Checkpoint, load_checkpoint

IN_TRACKING = ("runs:/", "models:/")


@dataclass(frozen=True)
class LocatedCheckpoint(Checkpoint):
    """A checkpoint on a local disk, and where it came from."""

    origin: str
    """Absolute path or URI of what was named; `path` is a copy where that is a URI or somebody else's format."""

    @property
    def name(self) -> str:
        """Last part of the origin, such as step_0001000."""
        return storage.split(self.origin)[1]

    @property
    def output(self) -> str:
        """The output that it belongs to: output/checkpoints/step_N, or what an imported one lies in."""
        folder = storage.split(self.origin)[0]
        return folder if self.config.get("recipe") is None else storage.split(folder)[0]

    @property
    def shared(self) -> str:
        """What another machine opens: a URI, or a path that it shares."""
        return str(self.path) if storage.is_local(self.origin) else self.origin


def open_checkpoint(
    where: "str | Path | LocatedCheckpoint",
    *,
    model: str | None = None,
    overrides: tuple[str, ...] = (),
    tracking_uri: str = "",
) -> LocatedCheckpoint:
    """Find a checkpoint and open it; what lies elsewhere, or is of another format, is copied into a cache first.

    model: name that official weights must have. overrides: of them autoencoder.id, objective.kind and the model's
    fields say what official weights cannot. tracking_uri: of MLflow, as in a recipe.
    Raises FileNotFoundError, ValueError, and ConnectionError if MLflow does not answer.
    """
    if isinstance(where, LocatedCheckpoint):
        return where
    place, expected = str(where), None
    if place.startswith(IN_TRACKING):
        from pipelines.tracking.lookup import find_checkpoint

        place, expected = find_checkpoint(tracking_uri, place)
    opened = _open(place, model, overrides)
    if expected and opened.digest != expected:
        raise ValueError(
            f"{where} is the checkpoint {expected[:12]}, but {place} now holds {opened.digest[:12]}: it was written "
            "anew after MLflow was told of it. Name the folder itself, or put the earlier checkpoint back"
        )
    return opened


def _open(place: str, model: str | None, overrides: tuple[str, ...]) -> LocatedCheckpoint:
    if not storage.exists(place):
        raise FileNotFoundError(
            f"no checkpoint at {place}: expected a folder such as checkpoints/step_0001000. Train one with "
            "`raydit train RECIPE`, or name one of a run (runs:/ID) or of the registry (models:/NAME@champion)"
        )
    path = Path(storage.fetch_folder(place))
    origin = str(path) if storage.is_local(place) else place
    if path.is_file() or (path / "model_index.json").is_file():
        found = _imported(path, model, overrides)
    elif model is not None:
        raise ValueError(f"--model {model}: found with {place}, which says itself what it is; leave --model out")
    else:
        found = load_checkpoint(path)
    return LocatedCheckpoint(found.path, found.config, found.digest, origin)


def _imported(path: Path, model: str | None, overrides: tuple[str, ...]) -> Checkpoint:
    """A checkpoint made of somebody else's weights, kept in the cache under what it was made from."""
    from pipelines.checkpoints.importing import import_checkpoint, import_settings

    settings = import_settings(overrides, pipeline=path.is_dir())
    if path.is_file() and model is None and "overrides" not in settings:
        raise ValueError(
            f"{path} is a file: expected a checkpoint folder, or the name of the model that these official weights are "
            f"of, such as --model DiT-XL/2; for a size without a name: raydit import {path} OUT"
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((stamps, model, sorted(settings.items()))).encode()).hexdigest()[:16]
    folder = Path(storage.cache_folder("imported")) / key / path.stem
    if folder.is_dir():
        return load_checkpoint(folder)
    return import_checkpoint(path, folder, model=model, **settings)
