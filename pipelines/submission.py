"""`raydit submit`: the same command, as a job on a cluster."""

import json
import os
from pathlib import Path

import click

from cluster import jobs, storage
from pipelines.identity import digest_of
from pipelines.progress import say
from pipelines.tracking import tracking_uri

WITH_RECIPE = ("run", "autoencoder", "encode", "train")


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
    """A readable id that is the same for the same command."""
    return f"raydit-{command[0]}-{name}-{digest_of(command)[:8]}"


def prepare(command: list[str]) -> tuple[list[str], str]:
    """The command with absolute paths, and a short name. Bad recipes are refused here, before anything is sent."""
    if command[0] in WITH_RECIPE and len(command) > 1 and not command[1].startswith("-"):
        from pipelines.recipe_file import load_recipe

        overrides = [value for flag, value in zip(command, command[1:], strict=False) if flag == "--set"]
        config = load_recipe(command[1], tuple(overrides))
        places = {"output": config.output, "images.path": config.images.path, "autoencoder.id": config.autoencoder.id}
        fixed = [f"{key}={json.dumps(absolute(path))}" for key, path in places.items() if path]
        flags = [part for setting in fixed for part in ("--set", setting)]
        return [command[0], absolute(command[1]), *command[2:], *flags], storage.safe_name(config.name)
    return [absolute(part) for part in command], Path(command[-1]).name or "job"


def absolute(path: str) -> str:
    """Absolute path of something that exists here or will be written here; anything else as it is."""
    exists_here = not path.startswith("-") and storage.is_local(path) and Path(path).exists()
    is_output = os.sep in path and storage.is_local(path) and Path(path.split(os.sep)[0]).is_dir()
    return str(Path(path).absolute()) if exists_here or is_output else path


def job_environment() -> dict[str, str]:
    """Where the job tracks: where the command would, run here."""
    return {"MLFLOW_TRACKING_URI": tracking_uri()}
