"""`raydit clean`: remove what an output has superseded."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pipelines.cli.options import OK, json_option, store_option
from pipelines.cli.output import print_line, print_result, shorten_path

if TYPE_CHECKING:
    from pipelines.registry.cleaning import SupersededFolder


@click.command()
@click.argument("output", type=click.Path())
@click.option("--dry-run", is_flag=True, help="List what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@store_option
@json_option
def clean(output: str, dry_run: bool, yes: bool, store: str, as_json: bool) -> None:
    """Empty superseded/ in OUTPUT, the folder or URI of a recipe's results.

    Checkpoints behind a registered model stay, and so do the autoencoders of kept checkpoints. runs:/ names of removed
    checkpoints stop working.
    """
    from cluster import storage
    from cluster.storage.lease import hold_folder
    from pipelines.artifacts import PLAN
    from pipelines.registry.cleaning import inspect_superseded

    found = inspect_superseded(output, store)
    removable = [folder for folder in found if not folder.kept_for]
    for folder in found:
        reason = (
            f"stays: {folder.kept_for}" if folder.kept_for else ("would be removed" if dry_run else "to be removed")
        )
        print_line("clean", f"{shorten_path(folder.path)}  {folder.num_bytes / 2**20:,.1f} MiB  {reason}")
    summary = _summarize(removable, len(found))
    if not removable or dry_run:
        print_line("clean", f"{summary} to remove" if removable else f"nothing to remove in {output}")
    elif not yes and not (sys.stdin.isatty() and click.confirm(f"Remove {summary}?")):
        raise click.UsageError(f"nothing was removed; confirm with --yes to remove {summary}")
    else:
        with hold_folder(storage.absolute(output), on_lost=lambda reason: None):
            # Looked at again: until now, a stage may have taken one of them back, or a model may have been registered.
            agreed = {folder.path for folder in removable}
            removable = [
                each for each in inspect_superseded(output, store) if not each.kept_for and each.path in agreed
            ]
            for folder in removable:
                storage.remove_file(storage.join(folder.path, PLAN))  # first, so that no stage takes back a part of it
                storage.remove_folder(folder.path)
        print_line("clean", f"removed {_summarize(removable, len(found))}")
    removed = [] if dry_run else [folder.path for folder in removable]
    kept = [folder.path for folder in found if folder.path not in removed]
    print_result(as_json, {"removed": removed, "kept": kept, "bytes": _count_bytes(removable)})
    sys.exit(OK)


def _summarize(removable: "Sequence[SupersededFolder]", count: int) -> str:
    """Return how many folders of `count` are removable, and their size."""
    return f"{len(removable)} of {count} folders, {_count_bytes(removable) / 2**20:,.1f} MiB"


def _count_bytes(folders: "Sequence[SupersededFolder]") -> int:
    return sum(folder.num_bytes for folder in folders)
