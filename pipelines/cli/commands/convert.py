"""`raydit import` and `raydit export`: checkpoints from and for other code."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from dit.config import Numerics, ProcessKind
from pipelines.cli.options import json_option, set_option
from pipelines.cli.output import echo, print_line, print_result

if TYPE_CHECKING:
    from pipelines.checkpoints.exporting import ExportFormat


@click.command(name="import")
@click.argument("source", metavar="FILE", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--model", help="Named size of the weights, such as DiT-XL/2; default: recognised by their shapes.")
@click.option(
    "--autoencoder",
    type=click.Path(),
    help="Folder of the autoencoder, or hub id (OWNER/NAME or OWNER/NAME@REVISION); default: the pipeline's own, else "
    "stabilityai/sd-vae-ft-ema.",
)
@click.option(
    "--objective",
    type=click.Choice(get_args(ProcessKind)),
    default="diffusion",
    show_default=True,
    help="What the weights were trained for; flow for SiT's and REPA's.",
)
@click.option(
    "--numerics",
    type=click.Choice(get_args(Numerics)),
    default="diffusers",
    show_default=True,
    help="For a pipeline folder: compute as diffusers does, or, if its weights were converted from official ones, "
    "as the official code does.",
)
@set_option
@json_option
def import_(
    source: str,
    out: str,
    model: str | None,
    autoencoder: str | None,
    objective: ProcessKind,
    numerics: Numerics,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert FILE to a checkpoint OUT.

    FILE is official DiT, SiT or U-ViT weights, or a diffusers DiT pipeline folder.
    """
    from pipelines.checkpoints.importing import import_checkpoint, summarize_import

    checkpoint = import_checkpoint(
        source,
        out,
        model=model,
        objective=objective,
        numerics=numerics,
        autoencoder=autoencoder,
        overrides=overrides,
    )
    for line in summarize_import(checkpoint):
        print_line("import", line)
    print_result(
        as_json, {"path": str(checkpoint.path), "digest": checkpoint.digest, "model": checkpoint.config["model"]}
    )


@click.command(name="export")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--format",
    type=click.Choice(["diffusers", "official"]),
    required=True,
    help="diffusers: a pipeline folder; official: a .pt file.",
)
@click.option("--weights", default="ema", show_default=True, help="Weights to export: averaged (ema) or trained (raw).")
@json_option
def export(checkpoint: str, out: str, format: ExportFormat, weights: str, as_json: bool) -> None:
    """Write CHECKPOINT to OUT for diffusers or the official code."""
    from pipelines.checkpoints.exporting import describe_export, export_checkpoint

    path = export_checkpoint(checkpoint, out, format=format, weights=weights)
    echo(f"export       {path}\n             {describe_export(path)}")
    print_result(as_json, {"path": str(path)})
