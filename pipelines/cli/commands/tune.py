"""`raydit tune`: search for the guidance, weights, sampler and steps with the lowest distance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import (
    FiniteRange,
    address_option,
    dry_run_option,
    json_option,
    model_option,
    open_checkpoint,
    set_option,
)
from pipelines.cli.output import print_line, print_result, shorten_path

if TYPE_CHECKING:
    from pipelines.config.tune import Interval, TuneGrid
    from pipelines.tune import TuneResult


def _parse_list(parse: Callable[[str], Any], values: str) -> Callable[..., Any]:
    """Return a callback that reads values that are separated by commas. values: what they are, for messages."""

    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[Any, ...]:
        try:
            return tuple(parse(part.strip()) for part in text.split(",")) if text else ()
        except ValueError:
            raise click.BadParameter(f"found {text!r}, expected {values}, separated by commas") from None

    return read


def _parse_interval(text: str) -> Interval:
    """Read LOW:HIGH, or "always" for None."""
    if text == "always":
        return None
    low, high = map(float, text.split(":"))
    return low, high


@click.command()
@click.argument("checkpoints", metavar="CHECKPOINT...", nargs=-1, required=True, type=click.Path())
@click.option("--cfg-scale", metavar="A,B,...", callback=_parse_list(float, "numbers"), help="Guidance scales to try.")
@click.option(
    "--cfg-interval",
    metavar="LOW:HIGH,...",
    callback=_parse_list(_parse_interval, "LOW:HIGH such as 0.2:0.8, or always"),
    help="Intervals of times in which guidance is on, such as 0.2:0.8; always: at all times.",
)
@click.option("--weights", metavar="A,B,...", callback=_parse_list(str, "names"), help="Weights, such as ema,ema_0.05.")
@click.option("--sampler", metavar="A,B,...", callback=_parse_list(str, "names"), help="Samplers to try.")
@click.option(
    "--sampling-steps", metavar="A,B,...", callback=_parse_list(int, "integers"), help="Numbers of steps to try."
)
@click.option("--num-samples", type=click.IntRange(min=20), help="Samples that the best candidates are measured on.")
@click.option(
    "--budget",
    type=FiniteRange(min=0.05, max=1),
    default=0.35,
    show_default=True,
    help="Share of the cost of scoring all candidates that may be spent; at least a ninth is always spent.",
)
@click.option("--recipe", type=click.Path(dir_okay=False), help="Recipe; default: the checkpoint's.")
@model_option
@set_option
@address_option
@dry_run_option
@json_option
def tune(
    checkpoints: tuple[str, ...],
    num_samples: int | None,
    budget: float,
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    dry_run: bool,
    as_json: bool,
    **grid: tuple[Any, ...],
) -> None:
    """Find the sampling settings with the lowest distance.

    All combinations of the given values are tried, on few samples first; the better ones on more. Without any, guidance
    scales and all averages of the weights are tried. The settings found are written to a protocol file, which
    `raydit evaluate --protocol FILE` scores by, on other samples than those of the search.
    """
    from pipelines.config.tune import TuneGrid
    from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
    from pipelines.scoring.protocols.given_recipe import load_given_recipe
    from pipelines.scoring.settings import EVALUATIONS
    from pipelines.stage import StageContext
    from pipelines.tune import default_grid, describe_search, plan_candidates, tune, tune_rungs

    if num_samples is not None:
        overrides = (*overrides, f"evaluate.num_samples={num_samples}")
    chosen: TuneGrid = TuneGrid(**grid)
    recipe_of = load_given_recipe(recipe, overrides) if recipe else partial(checkpoint_recipe, overrides=overrides)
    opened = [open_checkpoint(name, model, overrides) for name in checkpoints]
    if chosen.is_empty:
        chosen = default_grid(opened, [recipe_of(each) for each in opened])
    if dry_run:
        candidates = plan_candidates(opened, recipe_of, chosen)
        sizes = tune_rungs(candidates[0].config)
        print_line("plan", describe_search(candidates, sizes, budget))
        for candidate in candidates:
            print_line("candidate", f"{candidate.opened.name}: {candidate.protocol.summary}")
        return print_result(as_json, {"candidates": len(candidates), "samples": sizes})
    with StageContext(recipe_of(opened[0]), address=address, part=EVALUATIONS) as context:
        _print_found(tune(opened, recipe_of, chosen, budget=budget, context=context), as_json)


def _print_found(result: TuneResult, as_json: bool) -> None:
    """Print the best candidate and where its protocol lies."""
    best, content = result.best, result.content
    last = best["rungs"][-1]
    interval = best["cfg_interval"]
    guided = f" from {interval[0]:g} to {interval[1]:g}" if interval else ""
    settings = f"{best['sampler']} {best['sampling_steps']}, guidance {best['cfg_scale']:g}{guided}, {best['weights']}"
    print_line("best", f"{settings} weights, {shorten_path(best['checkpoint'])}")
    print_line("distance", f"{last['distance']:.5g} +- {last['error']:.2g} on {last['num_samples']:,} samples")
    print_line("spent", f"{content['spent']:.0%} of the cost of scoring all {len(content['candidates'])} candidates")
    print_line("protocol", shorten_path(result.protocol))
    print_result(as_json, {**content, "folder": result.folder, "protocol": result.protocol})
