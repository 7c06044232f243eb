"""`raydit import` and `raydit export`: checkpoints from and for other code."""

import click

from pipelines.cli.options import json_option, set_option
from pipelines.cli.output import print_result


@click.command(name="import")
@click.argument("source", metavar="FILE", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--model", help="Named size that the weights must have, such as DiT-XL/2; default: recognised.")
@click.option(
    "--autoencoder",
    type=click.Path(),
    help="Hub id or folder; default: stabilityai/sd-vae-ft-ema, or the pipeline's own.",
)
@click.option(
    "--objective",
    type=click.Choice(["diffusion", "flow"]),
    default="diffusion",
    show_default=True,
    help="What the weights were trained for; flow: SiT's.",
)
@click.option(
    "--numerics",
    type=click.Choice(["diffusers", "official"]),
    default="diffusers",
    show_default=True,
    help="Of a pipeline: compute what diffusers does, or, for weights converted from official ones, what those did.",
)
@set_option
@json_option
def import_(source, out, model, autoencoder, objective, numerics, overrides, as_json) -> None:
    """Make a checkpoint OUT of FILE: official DiT or U-ViT weights, or a diffusers DiT pipeline folder."""
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
        click.echo(f"import       {line}")
    print_result(
        as_json, {"path": str(checkpoint.path), "digest": checkpoint.digest, "model": checkpoint.config["model"]}
    )


@click.command(name="export")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", type=click.Choice(["diffusers", "official"]), required=True, help="A folder, or a .pt file.")
@click.option("--weights", default="ema", show_default=True, help="Averaged (ema), or as trained (raw).")
@json_option
def export(checkpoint, out, format, weights, as_json) -> None:
    """Write CHECKPOINT as OUT, for diffusers' DiTPipeline or for the official code."""
    from pipelines.checkpoints.exporting import describe_export, export_checkpoint

    path = export_checkpoint(checkpoint, out, format=format, weights=weights)
    click.echo(f"export       {path}\n             {describe_export(path)}")
    print_result(as_json, {"path": str(path)})
