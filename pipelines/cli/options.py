"""What the commands of `raydit` share: exit codes and options."""

import click

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False))
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's field.")
address_option = click.option("--address", help="Ray cluster to use; default: RAY_ADDRESS, else a local Ray.")
server_option = click.option(
    "--address", help="http://HOST:8265 of the cluster's head; default: RAY_API_SERVER_ADDRESS, else this machine's."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on the last line.")
store_option = click.option(
    "--store",
    metavar="URI",
    default="",
    help="MLflow's; default: a recipe's, MLFLOW_TRACKING_URI, else mlflow.db here.",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the resolved recipe and touch nothing.")


model_option = click.option("--model", help="Of an official .pt file: the named size of its weights, as DiT-XL/2.")


def open_checkpoint(checkpoint, model, overrides):
    from pipelines.checkpoints.open import open_checkpoint

    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    return open_checkpoint(checkpoint, model=model, overrides=overrides, tracking_uri=given.get("tracking.uri", ""))
