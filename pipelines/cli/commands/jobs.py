"""`raydit jobs`: what a job server knows, printed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pipelines.cli.options import json_option, server_option

if TYPE_CHECKING:
    from cluster.jobs import Job


@click.group()
def jobs() -> None:
    """Look after submitted jobs."""


@jobs.command("list")
@server_option
@json_option
def list_jobs(address, as_json) -> None:
    """All jobs, oldest first."""
    print_jobs(address, as_json)


@jobs.command()
@click.argument("job")
@server_option
@json_option
def status(job, address, as_json) -> None:
    """State of JOB, and where its MLflow runs are."""
    print_status(job, address, as_json)


@jobs.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until JOB ends; the exit code is its own.")
@server_option
def logs(job, follow, address) -> None:
    """What JOB has printed."""
    sys.exit(print_log(job, address, follow))


@jobs.command()
@click.argument("job")
@server_option
@json_option
def stop(job, address, as_json) -> None:
    """End JOB as Ctrl-C does; the same command goes on from there."""
    stop_job(job, address, as_json)


def print_jobs(address: str | None, as_json: bool) -> None:
    """One line for each job, or one JSON list."""
    from cluster import job_server, jobs

    found = jobs.list_jobs(address)
    if as_json:
        click.echo(json.dumps([asdict(job) for job in found]))
        return
    width = max((len(job.submission_id) for job in found), default=0)
    for job in found:
        started = (job.started or "not started").replace("T", " ").replace("+00:00", " UTC")
        click.echo(
            f"{job.submission_id:<{width}}  {job.status:<9}  {started:<23}  {job.metadata.get('raydit.name', '')}"
        )
    if not found:
        click.echo(f"no jobs at {job_server.server_url(address)}; start one: raydit submit -- run RECIPE")


def print_status(submission_id: str, address: str | None, as_json: bool) -> None:
    """All that is known about a job, with the MLflow runs that carry its id."""
    from cluster import jobs

    job = jobs.get_job(submission_id, address)
    runs, reason = runs_of(job)
    if as_json:
        click.echo(json.dumps({**asdict(job), "runs": runs}))
        return
    ended = "" if job.exit_code is None else f", exit code {job.exit_code}"
    click.echo(f"job          {job.submission_id}")
    click.echo(f"status       {job.status}{ended}")
    click.echo(f"started      {job.started or 'not yet'}")
    click.echo(f"command      {job.command}")
    click.echo(f"tracking     {job.metadata.get('raydit.tracking') or 'where the cluster decides'}{reason}")
    for run in runs:
        click.echo(f"run          {run['stage']:<12} {run['status']:<9} {run['link'] or run['id']}")


def runs_of(job: Job) -> tuple[list[dict[str, str]], str]:
    """The MLflow runs of a job, and why there are none if its store does not answer."""
    uri = job.metadata.get("raydit.tracking", "")
    if not uri:
        return [], ""
    from pipelines.tracking.lookup import runs_of_job

    try:
        return runs_of_job(uri, job.metadata.get("raydit.name", ""), job.submission_id), ""
    except ConnectionError as error:
        return [], f" (does not answer: {error})"


def print_log(submission_id: str, address: str | None, to_the_end: bool) -> int:
    """The log so far, or until the end; the exit code is the job's only if its end was waited for."""
    from cluster import jobs
    from pipelines.cli.submission.submit import follow

    if to_the_end:
        return follow(submission_id, address)
    click.echo(jobs.read_log(submission_id, address), nl=False)
    return 0


def stop_job(submission_id: str, address: str | None, as_json: bool) -> None:
    """Ask a job to end; one that has ended already is no error."""
    from cluster import jobs

    asked = jobs.stop(submission_id, address)
    if as_json:
        click.echo(json.dumps({"submission_id": submission_id, "stopping": asked}))
    else:
        click.echo(f"stop         {submission_id} {'is asked to end' if asked else 'had ended already'}")
