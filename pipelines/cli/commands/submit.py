"""`raydit submit`: run any command as a Ray job. How a job is prepared and started is in `pipelines.cli.submission`."""

import sys

import click

from pipelines.cli.options import server_option


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@server_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the log until the job ends.")
@click.option(
    "--pack/--no-pack",
    default=None,
    help="Send the working directory with the job; default: if the cluster is not on this machine.",
)
@click.option("--pip", is_flag=True, help="Send raydit too, and let the cluster install its requirements.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(address: str | None, wait: bool, pack: bool | None, pip: bool, command: tuple[str, ...]) -> None:
    """Run any raydit COMMAND as a Ray job.

    For example: raydit submit -- run RECIPE
    """
    from pipelines.cli.submission.command_line import CommandLine
    from pipelines.cli.submission.submit import submit_command

    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group), "submit is a command of the raydit group"
    given = CommandLine.read(root, list(command))
    sys.exit(submit_command(given, address=address, wait=wait, pack=pack, pip=pip))
