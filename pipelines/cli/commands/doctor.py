"""`raydit doctor`: check this machine and a cluster."""

import sys

import click

from pipelines.cli.options import FAILED, OK, json_option


@click.command()
@click.option("--address", help="Ray cluster to check: HOST:PORT, or http://HOST:8265 of its head.")
@click.option(
    "--output", type=click.Path(), default=".", show_default=True, help="Folder or URI where runs will write."
)
@json_option
def doctor(address, output, as_json) -> None:
    """Check versions, devices, Ray, storage, tracking and weights; say what to do where something is red."""
    from pipelines.cli.doctor_checks import examine

    sys.exit(OK if examine(address, output, as_json) else FAILED)
