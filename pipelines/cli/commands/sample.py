"""`raydit sample`: images from a checkpoint."""

from functools import partial

import click

from pipelines.cli.options import address_option, json_option, model_option, open_checkpoint, refuse_given, set_option
from pipelines.cli.output import print_line, print_result


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    default="grid.png",
    show_default=True,
    help="File of the grid, which is PNG; a name such as grid.jpg is refused.",
)
@click.option(
    "--classes",
    metavar="LIST",
    multiple=True,
    help="Classes of the grid, by name or number, such as 1,7; a class name takes precedence over a number. Pass a "
    'name that contains a comma in a --classes option of its own: --classes "cat, tabby" --classes dog. Default: all.',
)
@click.option("--columns", type=click.IntRange(min=1), default=8, show_default=True, help="Images of each class.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the samples; default: the recipe's.")
@click.option("--npz", type=click.Path(dir_okay=False), help="Write samples and labels to this file, in ADM's format.")
@click.option("--num-samples", type=click.IntRange(min=1), help="Number of samples for --npz; default: the recipe's.")
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False),
    help="Recipe whose seed and [evaluate] to sample by; default: the checkpoint's.",
)
@model_option
@set_option
@address_option
@json_option
def sample(
    checkpoint: str,
    out: str,
    classes: tuple[str, ...],
    columns: int,
    seed: int | None,
    npz: str | None,
    num_samples: int | None,
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    as_json: bool,
) -> None:
    """Draw samples from CHECKPOINT: a labelled grid, or --npz.

    With --npz, writes many samples and their labels to a file.
    """
    if npz is None and num_samples is not None:
        raise click.UsageError("--num-samples needs --npz FILE; the size of a grid is set by --classes and --columns")
    if npz is not None and classes:
        raise click.UsageError(
            "--classes is only for grids; with --npz, labels are drawn by --set evaluate.labels=balanced or random"
        )
    if npz is not None:
        refuse_given("is only for grids; leave out --npz", "out", "columns")
    else:
        refuse_given("is only for --npz FILE; a grid is sampled in this process", "address")
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
    from pipelines.scoring.protocols.given_recipe import load_given_recipe

    recipe_of = load_given_recipe(recipe, overrides) if recipe else partial(checkpoint_recipe, overrides=overrides)
    opened = open_checkpoint(checkpoint, model, overrides)
    from pipelines.sample import sample_file
    from pipelines.scoring.sample_grid import sample_grid, split_class_list

    config = recipe_of(opened)
    if npz is not None:
        count = num_samples or config.evaluate.num_samples
        path = sample_file(opened, config, npz, num_samples=count, address=address)
    else:
        known = opened.record.class_names
        names = [name for given in classes for name in split_class_list(given, known)] or None
        path = sample_grid(
            opened, config.evaluate, config.seed, out, classes=names, columns=columns, random=config.random
        )
    print_line("sample", path)
    print_result(as_json, {"path": path})
