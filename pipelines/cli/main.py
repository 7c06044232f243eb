"""The `raydit` command: its subcommands, and the exit codes and messages of errors.

Subcommands import what is heavy when they run, so that --help and mistakes in recipes answer at once.
"""

import sys
from typing import NoReturn

import click

from cluster import signals
from pipelines.cli.commands.autoencoders import autoencoders
from pipelines.cli.commands.clean import clean
from pipelines.cli.commands.compare import compare
from pipelines.cli.commands.convert import export, import_, merge
from pipelines.cli.commands.doctor import doctor
from pipelines.cli.commands.evaluate import evaluate
from pipelines.cli.commands.jobs import jobs
from pipelines.cli.commands.latents import latents
from pipelines.cli.commands.plan import plan
from pipelines.cli.commands.publish import publish
from pipelines.cli.commands.reference import reference
from pipelines.cli.commands.registry import lineage, promote
from pipelines.cli.commands.runs import runs
from pipelines.cli.commands.sample import sample
from pipelines.cli.commands.stages import autoencoder, encode, run, train
from pipelines.cli.commands.submit import submit
from pipelines.cli.commands.tune import tune
from pipelines.cli.commands.ui import ui
from pipelines.cli.commands.verify import verify
from pipelines.cli.options import BAD_INPUT, FAILED, INTERRUPTED
from raydit import __version__
from raydit.errors import DISK_REMEDIES, RayditError
from raydit.printable import printable

COMMANDS: tuple[click.Command, ...] = (
    *(run, autoencoder, encode, train, evaluate),
    *(plan, sample, tune, compare, publish, verify, reference, autoencoders, latents, import_, export, merge),
    *(runs, lineage, promote, clean, ui),
    *(submit, jobs, doctor),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="raydit")
def cli() -> None:
    """Encode, train and evaluate Diffusion Transformers on Ray."""


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted, 143 terminated.

    A RayditError is for the user, who gets its message in one line. Every exception that is not expected here is a bug:
    it keeps its traceback, with which Python ends the process with exit code 1.
    """
    with signals.handle_signals(exit_at_once=True):
        _run()


def _run() -> None:
    try:
        cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        exit_interrupted()
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except RayditError as error:
        _exit(_message_for_user(error), error.exit_code)
    except OSError as error:
        if error.errno not in DISK_REMEDIES:
            raise
        _exit(f"{error}. {DISK_REMEDIES[error.errno]}, and run the same command again to resume", FAILED)


def exit_interrupted() -> NoReturn:
    """End the command after a signal with one line and the signal's exit code."""
    code = signals.exit_code()
    how = "interrupted" if code == INTERRUPTED else "terminated"
    _exit(f"{how}; run the same command again to resume", code)


def _message_for_user(error: RayditError) -> str:
    """Return the error's message, also where Ray's class for errors of workers shows their traceback instead."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, RayditError) else error)


def _exit(message: str, code: int) -> NoReturn:
    click.echo(f"\nraydit: {printable(message)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
