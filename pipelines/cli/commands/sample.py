"""`raydit sample`: images from a checkpoint."""

import click

from pipelines.cli.options import address_option, json_option, model_option, open_checkpoint, set_option
from pipelines.cli.output import print_result


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), default="grid.png", show_default=True, help="PNG to write.")
@click.option("--classes", help="Names or numbers with commas between, such as 1,7; default: all.")
@click.option("--columns", type=click.IntRange(min=1), default=8, show_default=True, help="Images of each class.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the samples; default: the recipe's.")
@click.option("--npz", type=click.Path(dir_okay=False), help="Write samples and labels for other tools, as ADM does.")
@click.option("--num-samples", type=click.IntRange(min=1), help="Samples for --npz; default: the recipe's.")
@model_option
@set_option
@address_option
@json_option
def sample(checkpoint, out, classes, columns, seed, npz, num_samples, model, overrides, address, as_json) -> None:
    """Draw a labelled grid of samples from CHECKPOINT, or write many to a file (--npz)."""
    if npz is None and num_samples is not None:
        raise click.UsageError("--num-samples is for --npz FILE; a grid has --classes and --columns")
    if npz is not None and classes is not None:
        raise click.UsageError(
            "--classes is for a grid; --npz draws labels by --set evaluate.labels=balanced or random"
        )
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    opened = open_checkpoint(checkpoint, model, overrides)
    from pipelines.sample import sample_file
    from pipelines.scoring.protocols import checkpoint_recipe
    from pipelines.scoring.sample_grid import sample_grid

    config = checkpoint_recipe(opened, overrides)
    if npz is not None:
        count = num_samples or config.evaluate.num_samples
        path = sample_file(opened, config, npz, num_samples=count, address=address)
    else:
        names = [name.strip() for name in classes.split(",")] if classes else None
        path = sample_grid(opened, config.evaluate, config.seed, out, classes=names, columns=columns)
    click.echo(f"sample       {path}")
    print_result(as_json, {"path": path})
