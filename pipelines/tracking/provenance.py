"""What every run says of how it came about: description, code, environment, hardware and the resolved recipe."""

import functools
import getpass
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from cluster import storage
from pipelines.artifacts import digest_of
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe

PACKAGES = ("raydit", "torch", "ray", "mlflow", "diffusers")
COMMIT, DIRTY = "mlflow.source.git.commit", "raydit.code_dirty"
"""The first is MLflow's own name, which its UI shows."""
OUTPUT = "raydit.output"
RECIPE_FILE = "recipe.toml"
DESCRIPTION = "mlflow.note.content"


def provenance_tags(config: Recipe, stage: str, tags: dict[str, str]) -> dict[str, str]:
    """Tags for a run of a stage; tags: its other ones, of which the description speaks."""
    source = {"mlflow.source.name": f"raydit {stage}", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    described = {DESCRIPTION: description(config, stage, tags), OUTPUT: storage.absolute(config.output)}
    return {**code_tags(Path(__file__).parents[2]), **environment_tags(), **source, **described}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for it
        return "unknown"


def description(config: Recipe, stage: str, tags: dict[str, str]) -> str:
    """Markdown, shown with the run: what, how again, and where its neighbours are."""
    lines = [f"**{stage}** of the recipe `{config.name}`, in `{storage.absolute(config.output)}`."]
    if command := _command():
        lines += ["", f"Called as `{command}`, in `{Path.cwd()}`."]
    lines += ["", "The same settings again, with this run's artifact:", "", f"    {_again(stage, tags)}"]
    places = {"checkpoint": tags.get("raydit.checkpoint"), "latents": config.latents}
    neighbours = [f"`raydit lineage {place}`" for place in places.values() if place]
    lines += ["", f"What it was made from, and what was made of it: {' or '.join(neighbours)}."]
    return "\n".join(lines)


def _again(stage: str, tags: dict[str, str]) -> str:
    if stage in ("evaluate", "evaluations"):
        return f"raydit evaluate {tags.get('raydit.checkpoint', 'CHECKPOINT')} --recipe {RECIPE_FILE}"
    return f"raydit {'run' if stage == 'pipeline' else stage} {RECIPE_FILE}"


def _command() -> str:
    """The raydit command of this process; empty in a notebook or a script."""
    name = Path(sys.argv[0]).name
    arguments = [re.sub(r"://[^/@\s]+@", "://...@", argument) for argument in sys.argv[1:]]  # no password in the UI
    return shlex.join(["raydit", *arguments]) if name in ("raydit", "__main__.py") else ""


@functools.cache
def code_tags(root: Path) -> dict[str, str]:
    """Commit of the code in use and whether it was changed since; nothing where it is no git checkout."""
    if not (root / ".git").exists():  # git itself would look further up, and find another project
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {COMMIT: commit, DIRTY: str(dirty).lower()}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@functools.cache
def environment_tags() -> dict[str, str]:
    """Versions, and the machine that the stage was started on; which workers ran it, its settings say."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {f"raydit.version.{name}": version for name, version in versions.items()} | {"raydit.hardware": hardware()}


def hardware() -> str:
    """Cores, memory and GPUs of this machine. Asks no GPU library: that would take memory on a GPU."""
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} CPU cores", f"{gibibytes:.0f} GiB"]
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = next((line for line in file.read_text().splitlines() if line.startswith("Model:")), "Model: NVIDIA")
        parts.append(model.partition(":")[2].strip())
    return ", ".join(parts)


def recipe_artifact(config: Recipe, folder: Path) -> Path:
    """The resolved recipe as a file that raydit takes again, in a folder below `folder` named after its content."""
    content = resolved(config)
    path = folder / digest_of(content)[:12] / RECIPE_FILE
    if not path.is_file():
        storage.write_atomically(str(path), toml_of(content).encode())
    return path


def toml_of(content: dict, table: str = "") -> str:
    """A nested dictionary as TOML; None, which TOML has no word for, is left out."""
    values = {name: value for name, value in content.items() if value is not None}
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"[{table}]"] if table else []
    lines += [f"{name} = {_toml_value(value)}" for name, value in values.items() if name not in tables]
    parts = ["\n".join(lines) + "\n"] if lines else []
    parts += [toml_of(value, f"{table}.{name}" if table else name) for name, value in tables.items()]
    return "\n".join(parts)


def _toml_value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value)  # strings, numbers and booleans are written alike
