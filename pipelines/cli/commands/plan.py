"""`raydit plan`: memory, time and cost of a recipe before it runs."""

import click

from pipelines.cli.options import FiniteRange, json_option, recipe_argument, set_option
from pipelines.cli.output import echo, print_result


@click.command()
@recipe_argument
@set_option
@click.option("--cluster", metavar="NxDEVICE", help="Accelerators to plan for, such as 8xH100; default: this machine.")
@click.option("--images", type=click.IntRange(min=1), help="Number of images; default: counted in the recipe's data.")
@click.option(
    "--classes",
    type=click.IntRange(min=0),
    help="Number of classes, for --images; default: those that the recipe names, else 1000.",
)
@click.option(
    "--measured",
    multiple=True,
    metavar="STAGE=IMAGES/S",
    help="Measured speed of a stage: images per second of all its workers together, not of one.",
)
@click.option(
    "--price", type=FiniteRange(min=0, max=1_000_000), help="Dollars per device and hour; default: list price."
)
@json_option
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    images: int | None,
    classes: int | None,
    measured: tuple[str, ...],
    price: float | None,
    as_json: bool,
) -> None:
    """Print memory, time and cost of RECIPE without running it.

    For each stage: memory, storage, FLOPs, hours and dollars.
    """
    if classes is not None and images is None:
        raise click.UsageError("--classes is only for --images; without it, classes are counted in the recipe's data")
    if price is not None and not cluster:
        raise click.UsageError("--price is only for --cluster; this machine has no price")
    from pipelines.config.reader import load_recipe
    from pipelines.planning.hardware import parse_cluster
    from pipelines.planning.plan import count_images, make_plan, parse_speeds
    from pipelines.planning.render import plan_json, plan_lines

    config, speeds = load_recipe(recipe, overrides), parse_speeds(measured)
    counted = count_images(config, images, classes)
    if cluster:
        hardware = parse_cluster(cluster, price=price)
    else:
        from pipelines.planning.measure import measure_this_machine
        from pipelines.planning.started_networks import resolve_started_networks

        hardware = measure_this_machine(config, resolve_started_networks(config, counted.classes))
    keep = frozenset(override.partition("=")[0].strip() for override in overrides)
    made = make_plan(config, hardware, counted, keep=keep, speeds=speeds)
    for line in plan_lines(made):
        echo(line)
    print_result(as_json, plan_json(made))
