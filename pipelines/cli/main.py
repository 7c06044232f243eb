"""The `raydit` command: its subcommands, and the exit codes and messages of errors.

Subcommands import what is heavy when they run, so that --help and mistakes in recipes answer at once.
"""

import errno
import sys
from typing import NoReturn

import click

from pipelines.cli.commands.compare import compare
from pipelines.cli.commands.convert import export, import_
from pipelines.cli.commands.doctor import doctor
from pipelines.cli.commands.evaluate import evaluate
from pipelines.cli.commands.jobs import jobs
from pipelines.cli.commands.latents import latents
from pipelines.cli.commands.plan import plan
from pipelines.cli.commands.reference import reference
from pipelines.cli.commands.registry import lineage, promote
from pipelines.cli.commands.runs import runs
from pipelines.cli.commands.sample import sample
from pipelines.cli.commands.stages import autoencoder, encode, run, train
from pipelines.cli.commands.submit import submit
from pipelines.cli.commands.ui import ui
from pipelines.cli.options import BAD_INPUT, FAILED, INTERRUPTED

COMMANDS: tuple[click.Command, ...] = (
    *(run, autoencoder, encode, train, evaluate),
    *(plan, sample, compare, reference, latents, import_, export),
    *(runs, lineage, promote, ui),
    *(submit, jobs, doctor),
)

PACKAGES = ("pipelines", "dit", "evaluation", "cluster")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="raydit")
def cli() -> None:
    """Encode, train and evaluate Diffusion Transformers on Ray."""


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    try:
        cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _exit("interrupted; run the same command again to resume", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _exit(f"{error}. Free some space, and run the same command again to resume", FAILED)
        if not _is_ours(error):
            raise
        failed = isinstance(error, FloatingPointError | ConnectionError | ChildProcessError)
        _exit(str(error), FAILED if failed else BAD_INPUT)


def _exit(message: str, code: int) -> NoReturn:
    click.echo(f"\nraydit: {message}", err=True)
    sys.exit(code)


def _is_ours(error: BaseException) -> bool:
    """Whether a line of our own raised the error, so that its message is for the user and its traceback is not."""
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return False
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    return module.split(".")[0] in PACKAGES


if __name__ == "__main__":
    main()
