"""`raydit import`, `raydit export` and `raydit merge`: convert checkpoints from and to other projects' formats, and
merge adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import click

from dit.config import Numerics, ProcessKind
from pipelines.cli.options import json_option, set_option, store_option
from pipelines.cli.output import echo, print_line, print_result
from pipelines.config.toml_text import toml_value

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
@click.option(
    "--base",
    type=click.Path(),
    help="For an adapter (LoRA): the checkpoint whose weights it changes, to which OUT then refers.",
)
@store_option
@set_option
@json_option
def import_(
    source: str,
    out: str,
    model: str | None,
    base: str | None,
    autoencoder: str | None,
    objective: ProcessKind,
    numerics: Numerics,
    store: str,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert FILE to a checkpoint OUT.

    FILE is official DiT, SiT or U-ViT weights, a folder of their shards, or a diffusers DiT pipeline folder; with
    --base, an adapter that peft or diffusers saved. If the base is a weights file, the other options then describe its
    model.
    """
    from pipelines.checkpoints.adapters import import_adapter
    from pipelines.checkpoints.importing import import_checkpoint, summarize_import

    if base is not None:
        if numerics != "diffusers":
            raise click.UsageError(
                "--numerics cannot be combined with --base: import the base first, and pass the result as --base"
            )
        options = base_options(model, objective, autoencoder, overrides)
        checkpoint = import_adapter(source, out, base, tracking_uri=store, **options)
    else:
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


def base_options(
    model: str | None, objective: ProcessKind, autoencoder: str | None, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Return the options of `open_checkpoint` that say what a file of weights is of; none where nothing was given."""
    stated = [f"objective.kind={objective}"] if objective != "diffusion" else []
    if autoencoder is not None:
        stated.append(f"autoencoder.id={toml_value(autoencoder)}")
    options = {"model": model, "overrides": (*overrides, *stated)}
    return {name: value for name, value in options.items() if value}


@click.command(name="export")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--format",
    type=click.Choice(["diffusers", "official", "peft", "diffusers-lora"]),
    required=True,
    help="diffusers: a pipeline folder; official: a .pt file; peft, diffusers-lora: the adapter alone, with the names "
    "of raydit's model or of diffusers'.",
)
@click.option("--weights", default="ema", show_default=True, help="Weights to export: averaged (ema) or trained (raw).")
@store_option
@json_option
def export(checkpoint: str, out: str, format: ExportFormat, weights: str, store: str, as_json: bool) -> None:
    """Write CHECKPOINT to OUT for diffusers or the official code."""
    from pipelines.checkpoints.exporting import describe_export, export_checkpoint

    path = export_checkpoint(checkpoint, out, format=format, weights=weights, tracking_uri=store)
    echo(f"export       {path}\n             {describe_export(path)}")
    print_result(as_json, {"path": str(path)})


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("checkpoints", metavar="CHECKPOINT[=SHARE]...", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path())
@store_option
@json_option
def merge(checkpoints: tuple[str, ...], out: str, store: str, as_json: bool) -> None:
    """Merge adapters into their base, as an ordinary checkpoint OUT.

    Each CHECKPOINT was trained with [train.lora]. All must have the same base; the change of each is multiplied by its
    SHARE, as in A=0.5 B=0.5, which may be left out for a single one.
    """
    from pipelines.checkpoints.adapters import merge_checkpoints
    from pipelines.checkpoints.importing import summarize_import

    parts = [parse_share(each, alone=len(checkpoints) == 1) for each in checkpoints]
    checkpoint = merge_checkpoints(parts, out, tracking_uri=store)
    for line in summarize_import(checkpoint):
        print_line("merge", line)
    print_result(
        as_json, {"path": str(checkpoint.path), "digest": checkpoint.digest, "model": checkpoint.config["model"]}
    )


def parse_share(text: str, *, alone: bool) -> tuple[str, float]:
    """Return the checkpoint and the share that CHECKPOINT=SHARE names. alone: whether the share may be left out.

    A checkpoint whose own name has this form, such as runs/lr=0.001, is not cut in two.
    """
    from cluster import storage

    name, equals, share = text.rpartition("=")
    try:
        value = float(share) if equals and not storage.exists(text) else None
    except ValueError:
        value = None
    if value is None and alone:
        return text, 1.0
    if value is None or not name or not math.isfinite(value):
        raise click.UsageError(f"{text}: expected CHECKPOINT=SHARE with a number, such as {text}=0.5")
    return name, value
