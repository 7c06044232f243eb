"""Start a prepared command on a job server, or join the equal job that runs there, and follow its log."""

import tempfile
from pathlib import Path

import click

from cluster import job_server, jobs, signals
from pipelines.cli.options import BAD_INPUT, OK
from pipelines.cli.submission.command_line import CommandLine
from pipelines.cli.submission.prepare import Submission, prepare_local, prepare_remote
from pipelines.console import say
from raydit.errors import RayditError


def submit_command(command: CommandLine, *, address: str | None, wait: bool, pack: bool | None, pip: bool) -> int:
    """Start a raydit command on the cluster with the job server at `address`, and return the exit code.

    The same content submitted again while it runs is joined, not started twice. wait: follow the log until the job
    ends, and return its exit code. pack: send the working directory; None: only if the server is not at a loopback
    address. pip: let the cluster install what raydit needs, in the versions that are installed here.
    """
    address = job_server.server_url(address)
    if pack or pip or (pack is None and not job_server.is_this_machine(address)):
        submission = prepare_remote(command, Path.cwd(), install=pip)
    else:
        submission = prepare_local(command)
    job, joined = start(submission, address)
    say("submit", f"job {job} at {address}{' (already running)' if joined else ''}")
    if submission.package and not joined:
        size = f"{len(submission.package.files):,} files, {submission.package.num_bytes / 2**20:.1f} MiB"
        say("submit", f"sent the working directory without data, outputs and files in .gitignore: {size}")
    if not wait:
        say("submit", f"follow the log with: {follow_command(job, address)}")
        return OK
    return follow_job(job, address)


def start(submission: Submission, address: str) -> tuple[str, bool]:
    """Start a job, or join the equal one that runs. Returns its id and whether it was running already."""
    number, submission_id = 1, submission.job_id
    known = {job.submission_id: job for job in jobs.list_jobs(address)}
    while (earlier := known.get(submission_id)) is not None and earlier.has_ended:
        number += 1
        submission_id = f"{submission.job_id}-{number}"
    metadata = {"raydit.name": submission.name, "raydit.tracking": submission.tracking}
    with tempfile.TemporaryDirectory() as folder:
        archive = None
        if submission.package and not earlier:
            archive = Path(folder) / "package.zip"
            submission.package.write(archive)
        jobs.submit(
            submission.command,
            address=address,
            submission_id=submission_id,
            env=submission.env,
            metadata=metadata,
            working_dir=str(archive) if archive else None,
            pip=submission.pip,
            folder=submission.folder,
        )
    return submission_id, earlier is not None


def follow_job(job: str, address: str | None) -> int:
    """Print a job's log until the job ends, and return its exit code. Ctrl-C leaves the job running.

    MLflow runs that a killed job left open are closed.
    """
    try:
        code = jobs.follow(job, address, write=click.echo)
        if code not in (OK, BAD_INPUT):
            close_runs_of(jobs.get_job(job, address))
        return code
    except KeyboardInterrupt:
        say("submit", f"detached; job {job} continues. Follow its log again: {follow_command(job, address)}")
        say("submit", f"stop it: raydit jobs stop {job} --address {job_server.server_url(address)}")
        return signals.exit_code()


def close_runs_of(job: jobs.Job) -> None:
    """Close the runs that a killed job left open; they stay as they are if their store does not answer."""
    uri = job.metadata.get("raydit.tracking", "")
    if not uri:
        return
    from pipelines.tracking.lookup import close_runs, runs_of_job

    try:
        count = close_runs(uri, runs_of_job(uri, job.submission_id))
    except RayditError as error:
        say("submit", f"runs of {job.submission_id} may still be open: {error}")
        return
    if count:
        say(
            "submit",
            f"marked {count} open run(s) of {job.submission_id} as KILLED; they continue when the job is resumed",
        )


def follow_command(job: str, address: str | None) -> str:
    """Return the command that follows a job's log."""
    return f"raydit jobs logs -f {job} --address {job_server.server_url(address)}"
