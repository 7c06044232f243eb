"""What the commands of `raydit` share: exit codes, options, and opening a checkpoint with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from pipelines.checkpoints.open import LocatedCheckpoint

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
LAST_PORT = 65_535
"""The highest number of a TCP port."""


class FiniteRange(click.FloatRange):
    """A FloatRange that refuses NaN, which is neither below nor above any bound, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the recipe; repeatable."
)
address_option = click.option("--address", help="Ray cluster to use; default: RAY_ADDRESS, else a local Ray.")


def _warn_of_clear_token(context: click.Context, param: click.Parameter, address: str | None) -> str | None:
    """Say so if the token of a cluster is sent unencrypted to another machine."""
    from cluster.job_server import sends_token_in_clear

    if sends_token_in_clear(address):
        click.echo(
            "raydit: the token of the cluster goes over the network unencrypted; use https, or a tunnel such as "
            "ssh -L 8265:127.0.0.1:8265 HEAD",
            err=True,
        )
    return address


server_option = click.option(
    "--address",
    callback=_warn_of_clear_token,
    help="Job server of the cluster, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, else one on this machine.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on the last line.")
store_option = click.option(
    "--store",
    metavar="URI",
    default="",
    help="MLflow tracking URI; default: the recipe's, else MLFLOW_TRACKING_URI, else mlflow.db in this folder.",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Print the resolved recipe and the plan; write nothing but caches."
)
model_option = click.option("--model", help="Named size of the weights in an official .pt file, such as DiT-XL/2.")


def open_checkpoint(checkpoint: str, model: str | None, overrides: tuple[str, ...]) -> LocatedCheckpoint:
    """Open what a user names as CHECKPOINT, with the values of --model and --set.

    Runs and models are looked up in the tracking store that --set names, or else the recipe of the command's --recipe.
    """
    from pipelines.checkpoints.open import open_checkpoint
    from pipelines.config.overrides import given_tracking_uri

    uri = given_tracking_uri(overrides, click.get_current_context().params.get("recipe"))
    return open_checkpoint(checkpoint, model=model, overrides=overrides, tracking_uri=uri)


def refuse_given(reason: str, *names: str) -> None:
    """Raise click.UsageError if the user has given one of the current command's options, even with its default value.

    reason: why these options have no effect here; follows the flag in the message.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {reason}")
