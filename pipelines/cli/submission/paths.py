"""Paths in a recipe and in a command line, for a job that starts in another folder or on another machine."""

import os
from pathlib import Path

from cluster import job_package, storage
from pipelines.cli.submission.command_line import CommandLine
from pipelines.config.recipe import Recipe


def relative_places(config: Recipe | None) -> dict[str, str]:
    """Paths of a recipe that depend on the working directory, by field."""
    if config is None:
        return {}
    places: dict[str, str | None] = {"output": config.output}
    if config.images.path != "digits":
        places["images.path"] = config.images.path
    if config.autoencoder.id and Path(config.autoencoder.id).exists():
        places["autoencoder.id"] = config.autoencoder.id
    for name in ("reference", "extractor_weights"):
        places[f"evaluate.{name}"] = getattr(config.evaluate, name)
    return {key: path for key, path in places.items() if path and is_relative(path)}


def relative_arguments(command: CommandLine) -> list[tuple[str, str]]:
    found = [word.text for word in command.places if is_relative(word.text) and Path(word.text).exists()]
    return [(command.name, text) for text in found if text != command.recipe]


def is_relative(path: str) -> bool:
    return storage.is_local(path) and not path.startswith("file://") and not Path(path).is_absolute()


def refuse_unreachable(key: str, path: str, package: job_package.Package) -> None:
    """Refuse what would be looked for in a job's own folder, which is empty but for the package, and is not kept."""
    if key == "output" or not package.contains(path):
        raise ValueError(
            f"{key}: found {path!r}, a place on this machine that a job on another one does not have; expected a URI "
            "(s3://BUCKET/...) or the absolute path of a mount that all nodes of the cluster share"
        )


def absolute_places(config: Recipe) -> dict[str, str]:
    """The recipe's paths, by field: of what a job reads and writes, it finds nothing relative to its own folder."""
    places: dict[str, str | None] = {"output": absolute(config.output)}
    if config.images.path != "digits":
        places["images.path"] = absolute(config.images.path)
    places["autoencoder.id"] = config.autoencoder.id and absolute_if_here(config.autoencoder.id)
    for name in ("reference", "extractor_weights"):
        path = getattr(config.evaluate, name)
        places[f"evaluate.{name}"] = path and absolute(path)
    return {key: path for key, path in places.items() if path}


def absolute(path: str) -> str:
    return str(Path(path).absolute()) if storage.is_local(path) else path


def absolute_if_here(place: str) -> str:
    """Absolute path of what exists here, or will be written into a folder that does; anything else as it is."""
    if not storage.is_local(place):
        return place
    into_folder = os.sep in place and Path(place.split(os.sep)[0]).is_dir()
    return absolute(place) if into_folder or Path(place).exists() else place
