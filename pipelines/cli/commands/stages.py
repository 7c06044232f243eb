"""`raydit run`, `raydit autoencoder`, `raydit encode` and `raydit train`: the stages of a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import OK, address_option, dry_run_option, json_option, recipe_argument, set_option
from pipelines.cli.output import print_line, print_report, print_resolved, print_result

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe


def stage_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the argument and the options that every stage has."""
    for option in (json_option, dry_run_option, address_option, set_option, recipe_argument):
        function = option(function)
    return function


verify_option = click.option("--verify", is_flag=True, help="Check all latents before training, not only some shards.")


@click.command()
@stage_options
@verify_option
def run(
    recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool, verify: bool
) -> None:
    """Run all stages of RECIPE, and skip those that are finished."""
    config = _load("run", recipe, overrides, dry_run)
    from cluster import storage
    from pipelines.run import run_pipeline
    from pipelines.scoring.report_files import report_folder
    from pipelines.scoring.settings import EVALUATIONS
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        report = run_pipeline(config, verify=verify, context=context)
        checkpoint_name = storage.split(report.checkpoint)[1]
        folder = report_folder(config.folder(EVALUATIONS), report.protocol_id, checkpoint_name)
        print_report(report, folder, as_json, context.tracker.uri)


@click.command()
@stage_options
def autoencoder(recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool) -> None:
    """Train the autoencoder of RECIPE.

    Does nothing for a recipe with a pretrained autoencoder.
    """
    config = _load("autoencoder", recipe, overrides, dry_run)
    from pipelines.autoencoder import train_autoencoder

    handle = _run_job(train_autoencoder, config, address)
    print_result(as_json, {"id": handle.id, "path": str(handle.folder())})


@click.command()
@stage_options
def encode(recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool) -> None:
    """Encode the images of RECIPE into latents.

    With --dry-run: print how many latents there will be, their size, and the time that encoding takes.
    """
    config = _load("encode", recipe, overrides, False)
    if dry_run:
        return _print_encode_plan(config, as_json)
    from pipelines.encode import encode

    dataset = _run_job(encode, config, address)
    print_result(
        as_json,
        {
            "path": dataset.path,
            "rows": len(dataset),
            "quarantined": dataset.num_quarantined,
            "fingerprint": dataset.fingerprint,
        },
    )


@click.command()
@stage_options
@verify_option
def train(
    recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool, verify: bool
) -> None:
    """Train the model of RECIPE on its latents."""
    config = _load("train", recipe, overrides, dry_run)
    from pipelines.train import train

    checkpoint = _run_job(partial(train, verify=verify), config, address)
    print_result(as_json, {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest})


def _load(stage: str, path: str, overrides: tuple[str, ...], dry_run: bool) -> Recipe:
    """Read a stage's recipe; on a dry run check that its networks fit the images, print it and exit."""
    from pipelines.config.reader import load_recipe

    config = load_recipe(path, overrides, stage)
    if dry_run:
        from pipelines.planning.networks import check_networks

        check_networks(config)
        print_resolved(config)
        sys.exit(OK)
    return config


def _print_encode_plan(config: Recipe, as_json: bool) -> None:
    """Print the resolved recipe and the plan of its encode stage."""
    print_resolved(config)
    from pipelines.planning.encode_plan import encode_plan_lines, make_encode_plan

    plan = make_encode_plan(config)
    for name, text in encode_plan_lines(plan, config.encode):
        print_line(name, text)
    print_result(as_json, {**asdict(plan), "bytes": plan.bytes, "seconds": plan.seconds})


def _run_job(job: Callable[..., Any], config: Recipe, address: str | None) -> Any:
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        return job(config, context=context)
