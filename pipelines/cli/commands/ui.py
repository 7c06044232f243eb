"""`raydit ui`: the MLflow UI."""

import sys

import click

from cluster import signals
from pipelines.cli.options import LAST_PORT, set_option
from pipelines.cli.output import print_line


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, LAST_PORT),
    default=5000,
    show_default=True,
    help="First of the ten ports to try.",
)
@set_option
def ui(port: int, overrides: tuple[str, ...]) -> None:
    """Print the address of the MLflow UI; start it if needed.

    It is started on 127.0.0.1, and looked for there at ten ports from --port on.
    """
    from pipelines.cli.mlflow_ui import serve_ui
    from pipelines.config.overrides import given_tracking_uri
    from pipelines.tracking.store import tracking_uri

    uri = tracking_uri(given_tracking_uri(overrides))
    try:
        serve_ui(uri, port)
    except KeyboardInterrupt:
        print_line("ui", "stopped")
        sys.exit(signals.exit_code())
