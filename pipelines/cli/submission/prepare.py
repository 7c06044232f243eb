"""`raydit submit`: the same command, as a job on a cluster.

On this machine a job sees the same files, so paths are made absolute. On another one it gets the working directory
along (see cluster.packing), and reads and writes data where the cluster does: at URIs and absolute paths.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cluster import job_package
from pipelines.artifacts import digest_of
from pipelines.cli.submission.command_line import CommandLine
from pipelines.cli.submission.environment import given_environment, job_environment, sendable_environment
from pipelines.cli.submission.paths import (
    absolute_if_here,
    absolute_places,
    refuse_unreachable,
    relative_arguments,
    relative_places,
)
from pipelines.config.recipe import Recipe
from pipelines.console import say

OWN_PACKAGES = ("cluster", "dit", "evaluation", "pipelines", "raydit")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A raydit command, ready to be sent."""

    command: list[str]
    name: str
    """Of the recipe, or of what the command is about."""
    env: dict[str, str]
    tracking: str = ""
    """Where its runs are recorded, if that is decided here."""
    recipe: str = ""
    """The recipe's text."""
    package: job_package.Package | None = None
    """The working directory, for a job on another machine."""
    pip: tuple[str, ...] = ()

    @property
    def job_id(self) -> str:
        content = [self.recipe, self.package.digest()] if self.package else [self.recipe]
        return job_id(self.name, self.command, *content, *self.pip)


def job_id(name: str, command: list[str], *content: str) -> str:
    """A readable id that is the same for the same command and content, and can stand in a URL."""
    readable = re.sub(r"[^\w.-]+", "-", f"raydit-{command[0]}-{name}")
    return f"{readable}-{digest_of([command, *content])[:8]}"


def unpacked(command: CommandLine) -> Submission:
    """For a job server on this machine: a job starts in a folder of its own, but sees the files that are here."""
    config, text = read_recipe(command)
    env = job_environment()
    tracking = (config and config.tracking.uri) or env["MLFLOW_TRACKING_URI"]
    return Submission(
        command=prepare(command, config), name=name_of(command, config), env=env, tracking=tracking, recipe=text
    )


def packed(command: CommandLine, folder: Path, *, pip: bool = False) -> Submission:
    """For a job on another machine, which sees what is packed, URIs, and absolute paths that it has too."""
    config, text = read_recipe(command)
    extra = own_code(folder) if pip else {}
    if command.recipe is not None:
        recipe = Path(command.recipe).absolute()
        inside = recipe.is_relative_to(folder)
        name = recipe.relative_to(folder).as_posix() if inside else f"submitted/{recipe.name}"
        command = command.with_recipe(name)
        extra |= {name: recipe}
    package = job_package.pack(folder, extra)
    for key, path in [*relative_places(config).items(), *relative_arguments(command)]:
        refuse_unreachable(key, path, package)
    env = sendable_environment()
    if left := sorted(given_environment().keys() - env.keys()):
        say("submit", f"{', '.join(left)}: of this machine only, so the cluster's own setting counts")
    return Submission(
        command=command.texts,
        name=name_of(command, config),
        env=env,
        tracking=(config and config.tracking.uri) or env.get("MLFLOW_TRACKING_URI", ""),
        recipe=text,
        package=package,
        pip=tuple(job_package.pinned_requirements("raydit")) if pip else (),
    )


def read_recipe(command: CommandLine) -> tuple[Recipe | None, str]:
    """The recipe of a command and its text, if it has one. Bad ones are refused here, before anything is sent."""
    if command.recipe is None:
        return None, ""
    from pipelines.config.reader import load_recipe

    config = load_recipe(command.recipe, command.overrides)
    return config, Path(command.recipe).read_text(encoding="utf-8")


def own_code(folder: Path) -> dict[str, Path]:
    """raydit itself, for a cluster without it; the working directory's own comes first."""
    root = Path(__file__).resolve().parents[3]
    files = [file for name in OWN_PACKAGES for file in (root / name).rglob("*") if file.suffix in (".py", ".toml")]
    names = {file.relative_to(root).as_posix(): file for file in files}
    return {} if (folder / "pipelines" / "cli" / "__main__.py").is_file() else names


def prepare(command: CommandLine, config: Recipe | None) -> list[str]:
    """The command with absolute paths; config: its recipe."""
    fixed = [f"{key}={json.dumps(path)}" for key, path in absolute_places(config).items()] if config else []
    return [*command.with_places(absolute_if_here).texts, *(part for each in fixed for part in ("--set", each))]


def name_of(command: CommandLine, config: Recipe | None) -> str:
    """A short name: its recipe's, or that of a checkpoint or images."""
    if config and command.subject == command.recipe:
        return config.name
    return Path(command.subject).name if command.subject else "job"
