"""`raydit submit`: the same command, as a job on a cluster."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path

import click

from cluster import jobs, storage
from pipelines.config import Recipe
from pipelines.identity import digest_of
from pipelines.progress import say
from pipelines.tracking import tracking_uri

WITH_RECIPE = ("run", "autoencoder", "encode", "train")
WITH_VALUE = ("--set", "--address")  # flags of these commands that take one


def submit_command(command: list[str], *, address: str, wait: bool) -> int:
    """Start a raydit command on the cluster whose dashboard is at `address`; returns the exit code.

    A job starts in a folder of its own, so everything that is relative to this one is made absolute. The same
    command submitted again while it runs is joined, not started twice.
    """
    prepared, name = prepare(command)
    number, submission_id = 1, job_id(name, prepared)
    running = {job.submission_id: job for job in jobs.list_jobs(address)}
    while (earlier := running.get(submission_id)) is not None and earlier.has_ended:
        number += 1
        submission_id = f"{job_id(name, prepared)}-{number}"
    jobs.submit(prepared, address=address, submission_id=submission_id, env=job_environment())
    say("submit", f"job {submission_id} at {address}{', running already' if earlier else ''}")
    if not wait:
        return 0
    try:
        return jobs.follow(submission_id, address, write=click.echo)
    except KeyboardInterrupt:
        say("submit", f"detached; job {submission_id} goes on. The same command follows it again")
        return jobs.INTERRUPTED


def job_id(name: str, command: list[str]) -> str:
    """A readable id that is the same for the same command, and can stand in a URL."""
    readable = re.sub(r"[^\w.-]+", "-", f"raydit-{command[0]}-{name}")
    return f"{readable}-{digest_of(command)[:8]}"


def prepare(command: list[str]) -> tuple[list[str], str]:
    """The command with absolute paths, and a short name. Bad recipes are refused here, before anything is sent."""
    first = first_argument(command)
    if command[0] in WITH_RECIPE and first is not None:
        from pipelines.recipe_file import load_recipe

        config = load_recipe(command[first], overrides_in(command))
        fixed = [f"{key}={json.dumps(path)}" for key, path in absolute_places(config).items()]
        flags = [part for setting in fixed for part in ("--set", setting)]
        parts = [*command[:first], absolute(command[first]), *command[first + 1 :], *flags]
        return parts, config.name
    name = Path(command[first]).name if first is not None else "job"
    return [command[0], *map(absolute_if_here, command[1:])], name


def first_argument(command: list[str]) -> int | None:
    """Where the recipe or checkpoint stands: the first that is no flag and no value of one."""
    places = range(1, len(command))
    return next((i for i in places if not command[i].startswith("-") and command[i - 1] not in WITH_VALUE), None)


def overrides_in(command: list[str]) -> tuple[str, ...]:
    after = [value for flag, value in pairwise(command) if flag == "--set"]
    joined = [part.removeprefix("--set=") for part in command if part.startswith("--set=")]
    return (*after, *joined)


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


def absolute_if_here(part: str) -> str:
    """Absolute path of what exists here, or will be written into a folder that does; anything else as it is."""
    if part.startswith("-") or not storage.is_local(part):
        return part
    into_folder = os.sep in part and Path(part.split(os.sep)[0]).is_dir()
    return absolute(part) if into_folder or Path(part).exists() else part


def job_environment() -> dict[str, str]:
    """Where the job tracks: where the command would, run here."""
    return {"MLFLOW_TRACKING_URI": tracking_uri()}
