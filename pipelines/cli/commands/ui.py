"""`raydit ui`: the MLflow UI on the store in use."""

import click

from pipelines.cli.options import set_option


@click.command()
@click.option("--port", type=int, default=5000, show_default=True, help="The first of ten that are looked at.")
@set_option
def ui(port, overrides) -> None:
    """Print the address of the MLflow UI on the store in use; start it, at 127.0.0.1, where it does not run."""
    from pipelines.cli.mlflow_ui import serve_ui
    from pipelines.tracking.store import tracking_uri

    given = dict(override.split("=", 1) for override in overrides)
    serve_ui(tracking_uri(given.get("tracking.uri", "")), port)
