"""`raydit jobs`: list, watch and stop submitted jobs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pipelines.cli.options import OK, json_option, server_option
from pipelines.cli.output import echo, print_line, print_result
from raydit.errors import RayditError

if TYPE_CHECKING:
    from cluster.jobs import Job


@click.group()
def jobs() -> None:
    """List, watch and stop submitted jobs."""


@jobs.command("list")
@server_option
@json_option
def list_jobs(address: str | None, as_json: bool) -> None:
    """List all jobs, oldest first."""
    from cluster import job_server, jobs

    found = jobs.list_jobs(address)
    if as_json:
        click.echo(json.dumps([asdict(job) for job in found]))
        return
    width = max((len(job.submission_id) for job in found), default=0)
    name_width = max((len(job.metadata.get("raydit.name", "")) for job in found), default=0)
    for job in found:
        started = (job.started or "not started").replace("T", " ").replace("+00:00", " UTC")
        name = job.metadata.get("raydit.name", "")
        command = f"raydit {job.command}" if "raydit.command" in job.metadata else job.command
        echo(f"{job.submission_id:<{width}}  {job.status:<9}  {started:<23}  {name:<{name_width}}  {command}")
    if not found:
        click.echo(f"no jobs at {job_server.server_url(address)}; start one: raydit submit -- run RECIPE")


@jobs.command()
@click.argument("job")
@server_option
@json_option
def status(job: str, address: str | None, as_json: bool) -> None:
    """Print the status of JOB, and its MLflow runs."""
    from cluster import jobs

    details = jobs.get_job(job, address)
    runs, reason = find_runs(details)
    if as_json:
        click.echo(json.dumps({**asdict(details), "runs": runs}))
        return
    ended = "" if details.exit_code is None else f", exit code {details.exit_code}"
    print_line("job", details.submission_id)
    print_line("status", f"{details.status}{ended}")
    print_line("started", details.started or "not yet")
    print_line("command", details.command)
    print_line("tracking", f"{details.metadata.get('raydit.tracking') or 'set by the cluster'}{reason}")
    for run in runs:
        print_line("run", f"{run['stage']:<12} {run['status']:<9} {run['link'] or run['id']}")


def find_runs(job: Job) -> tuple[list[dict[str, str]], str]:
    """Return the MLflow runs of a job; none with a reason in words if their store does not answer or refuses access.

    Runs that a killed job left open are closed.
    """
    from pipelines.tracking.lookup import close_runs, runs_of_job

    uri = job.metadata.get("raydit.tracking", "")
    if not uri:
        return [], ""
    try:
        runs = runs_of_job(uri, job.submission_id)
        if job.has_ended:
            close_runs(uri, runs)
        return runs, ""
    except RayditError as error:
        return [], f" (its runs are unknown: {error})"


@jobs.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Follow the log until JOB ends, and exit with its exit code.")
@server_option
def logs(job: str, follow: bool, address: str | None) -> None:
    """Print the log of JOB."""
    if follow:
        from pipelines.cli.submission.submit import follow_job

        sys.exit(follow_job(job, address))
    from cluster import jobs

    click.echo(jobs.read_log(job, address), nl=False)
    sys.exit(OK)


@jobs.command()
@click.argument("job")
@server_option
@json_option
def stop(job: str, address: str | None, as_json: bool) -> None:
    """Stop JOB as Ctrl-C does; the same command, submitted again, resumes.

    A job that has ended already is not an error.
    """
    from cluster import jobs

    stopping = jobs.stop(job, address)
    if as_json:
        return print_result(True, {"submission_id": job, "stopping": stopping})
    print_line("stop", f"{job} {'is stopping' if stopping else 'had already ended'}")
