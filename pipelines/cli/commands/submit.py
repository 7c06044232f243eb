"""`raydit submit`: run any command as a Ray job."""

import sys

import click

from pipelines.cli.options import server_option


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@server_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the log until the job ends.")
@click.option("--pack/--no-pack", default=None, help="Send the working directory along; default: unless HOST is here.")
@click.option("--pip", is_flag=True, help="Send raydit too, and let a plain Ray cluster install what it needs.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(address, wait, pack, pip, command) -> None:
    """Run any raydit COMMAND as a Ray job: raydit submit -- run RECIPE."""
    from pipelines.cli.submission.command_line import CommandLine
    from pipelines.cli.submission.submit import submit_command

    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group), "submit is one of raydit's commands"
    given = CommandLine.read(root, list(command))
    sys.exit(submit_command(given, address=address, wait=wait, pack=pack, pip=pip))
