"""Prepare a raydit command as a job: the command, environment and files that are sent.

A job on this machine starts in the working directory, as the command would. A job on another machine gets a copy of it
(see `cluster.job_package`), and reads and writes data where the cluster can: at URIs and on shared mounts.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cluster import job_package
from pipelines.artifacts import digest_of
from pipelines.cli.submission.command_line import CommandLine
from pipelines.cli.submission.environment import forwarded_environment, local_job_environment, remote_job_environment
from pipelines.cli.submission.paths import (
    refuse_unreachable,
    refuse_unsent_module,
    relative_arguments,
    relative_recipe_paths,
)
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.tracking.database import absolute_uri
from pipelines.tracking.provenance import CODE, code_environment

MAIN_MODULE = "pipelines/cli/__main__.py"
"""File by which a folder or package is known to hold raydit's own code."""
OWN_PACKAGES = ("cluster", "dit", "evaluation", "pipelines", "raydit")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A raydit command that is ready to be sent."""

    command: list[str]
    """Words of the command, without "raydit"."""
    name: str
    """Name of the recipe, or of the checkpoint or images that the command is about."""
    env: dict[str, str]
    """Environment variables of the job."""
    tracking: str = ""
    """MLflow tracking URI, if it is set on this machine; empty if the cluster sets it."""
    recipe: str = ""
    """The recipe's text; empty without one."""
    folder: str = ""
    """The working directory, for a job on this machine."""
    package: job_package.Package | None = None
    """The working directory, for a job on another machine."""
    pip: tuple[str, ...] = ()
    """Requirements that the cluster installs for the job."""

    @property
    def job_id(self) -> str:
        """Readable id, which can be part of a URL and is equal for the same command and content."""
        readable = re.sub(r"[^\w.-]+", "-", f"raydit-{self.command[0]}-{self.name}")
        content = [self.recipe, self.package.digest() if self.package else self.folder]
        return f"{readable}-{digest_of([self.command, *content, *self.pip])[:8]}"


def prepare_local(command: CommandLine) -> Submission:
    """Prepare a job on this machine, which starts in the working directory and so finds the same files."""
    config, text = read_recipe(command)
    env = local_job_environment()
    return Submission(
        command=command.texts,
        name=job_name(command, config),
        env=env,
        tracking=absolute_uri(config.tracking.uri if config else "") or env["MLFLOW_TRACKING_URI"],
        recipe=text,
        folder=os.getcwd(),
    )


def prepare_remote(command: CommandLine, folder: Path, *, install: bool = False) -> Submission:
    """Prepare a job on another machine, which sees the files that are packed, URIs, and shared mounts.

    folder: the working directory, which is packed. install: send raydit's own code too, with its requirements.
    """
    config, text = read_recipe(command)
    extra_code = own_code(folder) if install else {}
    extra = dict(extra_code)
    if command.recipe is not None:
        recipe = Path(command.recipe)
        recipe = recipe.parent.resolve() / recipe.name  # without "..", which could lead out of the folder
        inside = recipe.is_relative_to(folder)
        name = recipe.relative_to(folder).as_posix() if inside else f"submitted/{recipe.name}"
        command = command.with_recipe(name)
        extra |= {name: recipe}
    package = job_package.pack(folder, extra)
    for key, path in [*relative_recipe_paths(config).items(), *relative_arguments(command)]:
        refuse_unreachable(key, path, package)
    for name in config.evaluate.functions if config else ():
        refuse_unsent_module(name, folder, package)
    env = remote_job_environment()
    if package.contains(MAIN_MODULE):
        env |= code_environment(CODE if extra_code else folder)
    if withheld := sorted(forwarded_environment().keys() - env.keys()):
        say("submit", f"{', '.join(withheld)}: not sent, because only this machine can reach it; the cluster's is used")
    tracking = config.tracking.uri if config and config.tracking.uri else env.get("MLFLOW_TRACKING_URI", "")
    if not tracking:
        say("submit", "tracking is not set here: the job is refused unless MLFLOW_TRACKING_URI is set on the cluster")
    return Submission(
        command=command.texts,
        name=job_name(command, config),
        env=env,
        tracking=tracking,
        recipe=text,
        package=package,
        pip=tuple(job_package.pinned_requirements("raydit")) if install else (),
    )


def read_recipe(command: CommandLine) -> tuple[Recipe | None, str]:
    """Return a command's recipe and its text, if it has one. Raises the same errors as `load_recipe`, before anything
    is sent."""
    if command.recipe is None:
        return None, ""
    from pipelines.config.reader import load_recipe

    config = load_recipe(command.recipe, command.overrides, command.name)
    return config, Path(command.recipe).read_text(encoding="utf-8")


def own_code(folder: Path) -> dict[str, Path]:
    """Return raydit's own files by their names in a package; none if the working directory holds raydit itself."""
    if (folder / MAIN_MODULE).is_file():
        return {}
    files = [file for name in OWN_PACKAGES for file in (CODE / name).rglob("*") if file.suffix in (".py", ".toml")]
    return {file.relative_to(CODE).as_posix(): file for file in files}


def job_name(command: CommandLine, config: Recipe | None) -> str:
    """Return a short name: the recipe's, or the last part of the path of a checkpoint or images."""
    if config and command.subject == command.recipe:
        return config.name
    return Path(command.subject).name if command.subject else "job"
