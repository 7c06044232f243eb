"""Provenance of a run: its description, code, environment, hardware and the resolved recipe."""

import functools
import getpass
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from cluster import storage
from pipelines.artifacts import digest_of
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.tracking import tags
from raydit.printable import one_line, printable
from raydit.versions import installed_version

PACKAGES = ("raydit", "torch", "ray", "mlflow", "diffusers")
RECIPE_FILE = "recipe.toml"
CODE = Path(__file__).resolve().parents[2]
"""Folder of raydit's own code."""
CODE_VARIABLES = {tags.COMMIT: "RAYDIT_COMMIT", tags.CODE_DIRTY: "RAYDIT_CODE_DIRTY"}
"""Environment variables that carry the commit to a job with which the code was sent, without its repository."""


def provenance_tags(config: Recipe, stage: str, run_tags: dict[str, str]) -> dict[str, str]:
    """Return the tags that say how a run of a stage came about.

    run_tags: the other tags of the run, which its description mentions.
    """
    source = {"mlflow.source.name": f"raydit {stage}", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    described = {
        tags.DESCRIPTION: run_description(config, stage, run_tags),
        tags.OUTPUT: storage.absolute(config.output),
    }
    return {**code_tags(CODE), **environment_tags(), **source, **described}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return "unknown"


def run_description(config: Recipe, stage: str, run_tags: dict[str, str]) -> str:
    """Return the description of a run in Markdown: what it is, how to repeat it, and how to find its lineage."""
    lines = [f"**{stage}** of the recipe {_code(config.name)}, in {_code(storage.absolute(config.output))}."]
    if command := _command():
        lines += ["", f"Called as {_code(command)}, in {_code(str(Path.cwd()))}."]
    lines += [
        "",
        "To repeat it with the same settings, take this run's artifact:",
        "",
        f"    {_repeat_command(stage, run_tags)}",
    ]
    artifacts = [run_tags.get(tags.CHECKPOINT), config.latents]
    commands = [_code(f"raydit lineage {shlex.quote(artifact)}") for artifact in artifacts if artifact]
    lines += ["", f"Its inputs and results: {' or '.join(commands)}."]
    return "\n".join(map(printable, lines))


def _repeat_command(stage: str, run_tags: dict[str, str]) -> str:
    if stage in ("evaluate", "evaluations"):
        checkpoint = shlex.quote(run_tags.get(tags.CHECKPOINT, "CHECKPOINT"))
        return f"raydit evaluate {checkpoint} --recipe {RECIPE_FILE}"
    if stage == "autoencoders":
        words = ["raydit", stage, "evaluate", run_tags[tags.AUTOENCODER], "--images", run_tags[tags.IMAGES]]
        return _command() or shlex.join(words)
    return f"raydit {'run' if stage == 'pipeline' else stage} {RECIPE_FILE}"


def _code(text: str) -> str:
    """Return a text as code in Markdown, fenced by more backticks than it has in a row, in one line."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{one_line(text)}{padding}{fence}"


def _command() -> str:
    """Return the raydit command of this process; empty in a notebook or a script."""
    name = Path(sys.argv[0]).name
    arguments = [re.sub(r"://[^/@\s]+@", "://...@", argument) for argument in sys.argv[1:]]  # no password in the UI
    return shlex.join(["raydit", *arguments]) if name in ("raydit", "__main__.py") else ""


@functools.cache
def code_tags(root: Path) -> dict[str, str]:
    """Return the commit of the code and whether it has uncommitted changes; nothing if they are unknown.

    They come from its git checkout, or from the environment of a job that the code was sent with.
    """
    if not (root / ".git").exists():  # git would search the parent folders, and find another project
        return {tag: os.environ[name] for tag, name in CODE_VARIABLES.items() if name in os.environ}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {tags.COMMIT: commit, tags.CODE_DIRTY: str(dirty).lower()}


def code_environment(root: Path) -> dict[str, str]:
    """Return the environment variables that tell a job the commit of the code in `root`, which is sent with it."""
    return {CODE_VARIABLES[tag]: value for tag, value in code_tags(root).items()}


def code_record() -> dict[str, Any] | None:
    """Return the commit of the running code and whether it has uncommitted changes, as reports record it, if known."""
    found = code_tags(CODE)
    return {"commit": found[tags.COMMIT], "dirty": found[tags.CODE_DIRTY] == "true"} if found else None


def code_label(run_tags: Mapping[str, str]) -> str:
    """Return the first digits of the commit that a run's tags name, marked if it had changes; empty if unknown."""
    changed = " with uncommitted changes" if run_tags.get(tags.CODE_DIRTY) == "true" else ""
    return run_tags[tags.COMMIT][:12] + changed if tags.COMMIT in run_tags else ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@functools.cache
def environment_tags() -> dict[str, str]:
    """Return the versions of packages, and the hardware of the machine that started the stage."""
    versions = {"python": platform.python_version()}
    versions |= {name: installed_version(name) or "not installed" for name in PACKAGES}
    found = {f"{tags.VERSION_PREFIX}{name}": version for name, version in versions.items()}
    return {**found, tags.HARDWARE: hardware()}


def hardware() -> str:
    """Describe the cores, memory and GPUs of this machine, without a GPU library, which would take GPU memory."""
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} CPU cores", f"{gibibytes:.0f} GiB"]
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = next((line for line in file.read_text().splitlines() if line.startswith("Model:")), "Model: NVIDIA")
        parts.append(model.partition(":")[2].strip())
    return ", ".join(parts)


def recipe_artifact(config: Recipe, folder: Path) -> Path:
    """Write the resolved recipe as a TOML file that raydit reads, below `folder` in a folder named after its digest."""
    content = resolved(config)
    path = folder / digest_of(content)[:12] / RECIPE_FILE
    if not path.is_file():
        storage.write_atomically(str(path), toml_of(content).encode())
    return path


def toml_of(content: Mapping[str, Any]) -> str:
    """Return nested settings as TOML. None, for which TOML has no value, is left out."""
    return tomli_w.dumps(_without_none(content))


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in content.items() if value is not None}
    return {name: _without_none(value) if isinstance(value, dict) else value for name, value in given.items()}
