"""`raydit ui`: the MLflow UI."""

import click

from pipelines.cli.options import set_option


@click.command()
@click.option("--port", type=int, default=5000, show_default=True, help="First of the ten ports to try.")
@set_option
def ui(port: int, overrides: tuple[str, ...]) -> None:
    """Print the address of the MLflow UI, and start it on 127.0.0.1 if it does not run yet."""
    from pipelines.cli.mlflow_ui import serve_ui
    from pipelines.tracking.store import tracking_uri

    given = dict(override.split("=", 1) for override in overrides)
    serve_ui(tracking_uri(given.get("tracking.uri", "")), port)
