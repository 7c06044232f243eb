"""Paths in a recipe and in a command, for a job on another machine."""

import re
from pathlib import Path

from cluster import job_package, storage
from evaluation.features.function_extractor import find_source
from pipelines.cli.submission.command_line import CommandLine
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.recipe import Recipe
from pipelines.config.toml_text import toml_value
from pipelines.images.open import is_on_hub
from pipelines.images.validation import names_split
from pipelines.tracking.database import absolute_uri
from raydit.errors import InvalidInput


def relative_recipe_paths(config: Recipe | None) -> dict[str, str]:
    """Return the paths of a recipe that depend on the working directory, by field."""
    if config is None:
        return {}
    paths: dict[str, str | None] = {"output": config.output, "encode.output": config.encode.output}
    paths["images.path"] = _images_path(config)
    if (validation := _validation_path(config)) and Path(validation).exists():
        paths["images.validation"] = validation
    paths |= {field: id for field, id in _autoencoders(config).items() if Path(id).exists()}
    if (guide := config.evaluate.autoguidance) and Path(guide).exists():
        paths["evaluate.autoguidance"] = guide
    if config.train.start and (start := config.train.start.checkpoint) and Path(start).exists():
        paths["train.start.checkpoint"] = start
    paths |= _scoring_paths(config.evaluate)
    relative = {key: path for key, path in paths.items() if path and is_relative(path)}
    uri = config.tracking.uri
    return relative if absolute_uri(uri) == uri else {**relative, "tracking.uri": uri}


def _autoencoders(config: Recipe) -> dict[str, str]:
    """Return the pretrained autoencoders that a recipe names by folder or hub id, by field."""
    trained = config.autoencoder.train
    named = {"autoencoder.id": config.autoencoder.id, "autoencoder.train.start": trained.start if trained else None}
    return {field: id for field, id in named.items() if id}


def _scoring_paths(config: EvaluateConfig) -> dict[str, str]:
    """Return the paths of reference statistics and of extractors' weights, by field; of a table, each entry."""
    paths: dict[str, str] = {}
    for name in ("reference", "extractor_weights"):
        field, value = f"evaluate.{name}", getattr(config, name)
        entries = value if isinstance(value, dict) else {}
        paths |= {f"{field}.{quote_key(extractor)}": path for extractor, path in entries.items()}
        paths |= {field: value} if isinstance(value, str) else {}
    return paths


def quote_key(name: str) -> str:
    """Return the name of a table's entry as a part of a dotted key, in quotes where TOML needs them."""
    return name if re.fullmatch(r"[\w-]+", name) else toml_value(name)


def _images_path(config: Recipe) -> str | None:
    """Return images.path where it is a path or URI, and names neither the digits nor a data set on the hub."""
    return None if config.images.path == "digits" or is_on_hub(config.images) else config.images.path


def _validation_path(config: Recipe) -> str | None:
    """Return images.validation where it may be a path, and names neither a split nor the digits."""
    validation = config.images.validation
    return None if validation in (None, "digits") or names_split(validation) else validation


def relative_arguments(command: CommandLine) -> list[tuple[str, str]]:
    """Return the words of a command that are existing relative paths, each with the command's name; not its recipe."""
    found = [word.text for word in command.possible_paths if is_relative(word.text) and Path(word.text).exists()]
    return [(command.name, text) for text in found if text != command.recipe]


def refuse_unreachable(key: str, path: str, package: job_package.Package) -> None:
    """Raise InvalidInput for a path that a job on another machine does not find, or whose content it would lose.

    Such a job starts in a folder that holds only the package and is deleted at the end.
    """
    if key in ("output", "encode.output", "tracking.uri") or not package.contains(path):
        raise InvalidInput(
            f"{key}: found {path!r}, a path on this machine, which a job on another machine does not have",
            "a URI (s3://BUCKET/...) or the absolute path of a mount that all nodes of the cluster share",
            f"copy it there and set {key} accordingly",
        )


def refuse_unsent_module(name: str, folder: Path, package: job_package.Package) -> None:
    """Raise InvalidInput if the module of a function that extracts features lies in `folder` and is not sent.

    Modules elsewhere are installed ones, which the cluster's nodes must have: workers check that they do.
    """
    source = find_source(name)
    if source.is_relative_to(folder) and not package.contains(source.relative_to(folder).as_posix()):
        raise InvalidInput(
            f"evaluate.extractors: found {name!r}, whose module {source.name} is not sent with the job",
            "a file that is neither in .gitignore nor in a folder for data or outputs",
            "move it, or remove it from .gitignore",
        )


def is_relative(path: str) -> bool:
    """Whether a path depends on the working directory; URIs do not."""
    return storage.is_local(path) and not path.startswith("file://") and not Path(path).is_absolute()
