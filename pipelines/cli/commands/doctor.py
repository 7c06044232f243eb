"""`raydit doctor`: check this machine and a cluster. The checks are in `pipelines.cli.doctor_checks`."""

import sys

import click

from pipelines.cli.options import FAILED, OK, json_option


@click.command()
@click.option("--address", help="Ray cluster to check: HOST:PORT, or its job server, http://HOST:8265.")
@click.option("--output", type=click.Path(), default=".", show_default=True, help="Folder or URI of future outputs.")
@json_option
def doctor(address: str | None, output: str, as_json: bool) -> None:
    """Check this machine and a cluster, and say what to repair.

    The checks are of versions, devices, Ray, storage, tracking and weights. Exit code 1 if any of them fails.
    """
    from pipelines.cli.doctor_checks import run_checks

    sys.exit(OK if run_checks(address, output, as_json) else FAILED)
