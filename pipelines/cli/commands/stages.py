"""`raydit run`, `autoencoder`, `encode` and `train`: the stages of a recipe."""

import sys
from dataclasses import asdict

import click

from pipelines.cli.options import OK, address_option, dry_run_option, json_option, recipe_argument, set_option
from pipelines.cli.output import print_report, print_resolved, print_result


def job_options(function):
    for option in (json_option, dry_run_option, address_option, set_option, recipe_argument):
        function = option(function)
    return function


@click.command()
@job_options
def run(recipe, overrides, address, dry_run, as_json) -> None:
    """All stages of RECIPE in a row; finished ones are skipped."""
    config = _recipe(recipe, overrides, dry_run)
    from cluster import storage
    from pipelines.run import run_pipeline
    from pipelines.scoring.report_files import report_folder
    from pipelines.scoring.settings import EVALUATIONS
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        report = run_pipeline(config, context=context)
        checkpoint_name = storage.split(report.checkpoint)[1]
        folder = report_folder(config.folder(EVALUATIONS), report.protocol_id, checkpoint_name)
        print_report(report, folder, as_json, context.tracker.uri)


@click.command()
@job_options
def autoencoder(recipe, overrides, address, dry_run, as_json) -> None:
    """Train the autoencoder of RECIPE, where it asks for its own."""
    config = _recipe(recipe, overrides, dry_run)
    from pipelines.autoencoder import train_autoencoder

    handle = _with_context(train_autoencoder, config, address)
    print_result(as_json, {"id": handle.id, "path": str(handle.folder())})


@click.command()
@job_options
def encode(recipe, overrides, address, dry_run, as_json) -> None:
    """Encode the images of RECIPE into latents; --dry-run says how many, how large and how long."""
    config = _recipe(recipe, overrides, False)
    if dry_run:
        return _print_encode_plan(config, as_json)
    from pipelines.encode import encode

    dataset = _with_context(encode, config, address)
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
@job_options
def train(recipe, overrides, address, dry_run, as_json) -> None:
    """Train the model of RECIPE on its latents."""
    config = _recipe(recipe, overrides, dry_run)
    from pipelines.train import train

    checkpoint = _with_context(train, config, address)
    print_result(as_json, {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest})


def _recipe(path: str, overrides: tuple[str, ...], dry_run: bool):
    from pipelines.config.reader import load_recipe

    config = load_recipe(path, overrides)
    if dry_run:  # the resolved recipe, and end: nothing else is done
        print_resolved(config)
        sys.exit(OK)
    return config


def _print_encode_plan(config, as_json: bool) -> None:
    """The resolved recipe, and what there is to encode."""
    print_resolved(config)
    from pipelines.planning.encode_plan import encode_plan_lines, make_encode_plan

    plan = make_encode_plan(config)
    for name, text in encode_plan_lines(plan, config.encode):
        click.echo(f"{name:<12} {text}")
    print_result(as_json, {**asdict(plan), "bytes": plan.bytes, "seconds": plan.seconds})


def _with_context(job, config, address):
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        return job(config, context=context)
