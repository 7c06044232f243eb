"""The `raydit` command: parses, calls a job, prints. Everything heavy is imported by the command that needs it."""

import errno
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from pipelines.cli_options import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    OK,
    address_option,
    dry_run_option,
    json_option,
    print_result,
    recipe_argument,
    set_option,
)
from pipelines.cli_tools import TOOLS

PACKAGES = ("pipelines", "dit", "evaluation", "cluster")


def job_options(function):
    for option in (json_option, dry_run_option, address_option, set_option, recipe_argument):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="raydit")
def cli() -> None:
    """Encode, train and evaluate Diffusion Transformers on Ray."""


@cli.command()
@job_options
def run(recipe, overrides, address, dry_run, as_json) -> None:
    """All stages of RECIPE in a row; finished ones are skipped."""
    config = _recipe(recipe, overrides, dry_run)
    from pipelines.evaluate import report_folder
    from pipelines.run import run_pipeline
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        report = run_pipeline(config, context=context)
        _print_report(report, report_folder(config, report), as_json, context.tracker.uri)


@cli.command()
@job_options
def autoencoder(recipe, overrides, address, dry_run, as_json) -> None:
    """Train the autoencoder of RECIPE, where it asks for its own."""
    config = _recipe(recipe, overrides, dry_run)
    from pipelines.autoencoder import train_autoencoder

    handle = _with_context(train_autoencoder, config, address)
    print_result(as_json, {"id": handle.id, "path": str(handle.folder())})


@cli.command()
@job_options
def encode(recipe, overrides, address, dry_run, as_json) -> None:
    """Encode the images of RECIPE into latents; --dry-run says how many, how large and how long."""
    config = _recipe(recipe, overrides, False)
    if dry_run:
        return _print_encode_plan(config, as_json)
    from pipelines.encode import encode

    dataset = _with_context(encode, config, address)
    counts = {name: dataset.manifest[name] for name in ("rows", "quarantined", "fingerprint")}
    print_result(as_json, {"path": str(dataset.path), **counts})


@cli.command()
@job_options
def train(recipe, overrides, address, dry_run, as_json) -> None:
    """Train the model of RECIPE on its latents."""
    config = _recipe(recipe, overrides, dry_run)
    from pipelines.train import train

    checkpoint = _with_context(train, config, address)
    print_result(as_json, {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest})


@cli.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--recipe", type=click.Path(dir_okay=False), help="Take the protocol from here, not from the checkpoint.")
@click.option("--num-samples", type=click.IntRange(min=2), help="Images to sample.")
@click.option("--reference", type=click.Path(), help="Reference statistics (.npz) instead of the training images'.")
@click.option("--force", is_flag=True, help="Evaluate again where there is a report already.")
@set_option
@address_option
@dry_run_option
@json_option
def evaluate(checkpoint, recipe, num_samples, reference, force, overrides, address, dry_run, as_json) -> None:
    """Sample from CHECKPOINT and score the samples."""
    if num_samples is not None:
        overrides = (*overrides, f"evaluate.num_samples={num_samples}")
    if reference is not None:
        overrides = (*overrides, f"evaluate.reference={json.dumps(reference)}")
    config = _checkpoint_recipe(checkpoint, recipe, overrides, dry_run)
    from pipelines.evaluate import evaluate, report_folder
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        report = evaluate(checkpoint, config=config, context=context, force=force)
        _print_report(report, report_folder(config, report), as_json, context.tracker.uri)


@cli.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), default="grid.png", show_default=True, help="PNG to write.")
@click.option("--classes", help="Names or numbers with commas between, such as 1,7; default: all.")
@click.option("--columns", type=click.IntRange(min=1), default=8, show_default=True, help="Images of each class.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the samples; default: the recipe's.")
@click.option("--npz", type=click.Path(dir_okay=False), help="Write samples and labels for other tools, as ADM does.")
@click.option("--num-samples", type=click.IntRange(min=1), help="Samples for --npz; default: the recipe's.")
@set_option
@address_option
@json_option
def sample(checkpoint, out, classes, columns, seed, npz, num_samples, overrides, address, as_json) -> None:
    """Draw a labelled grid of samples from CHECKPOINT, or write many to a file (--npz)."""
    if npz is None and num_samples is not None:
        raise click.UsageError("--num-samples is for --npz FILE; a grid has --classes and --columns")
    if npz is not None and classes is not None:
        raise click.UsageError(
            "--classes is for a grid; --npz draws labels by --set evaluate.labels=balanced or random"
        )
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    config = _checkpoint_recipe(checkpoint, None, overrides, False)
    from pipelines.sample import sample_file, sample_grid
    from pipelines.stage import StageContext

    if npz is not None:
        with StageContext(config, address=address) as context:
            count = num_samples or config.evaluate.num_samples
            path = sample_file(checkpoint, config, Path(npz), num_samples=count, context=context)
    else:
        names = [name.strip() for name in classes.split(",")] if classes else None
        path = sample_grid(checkpoint, config, Path(out), classes=names, columns=columns)
    click.echo(f"sample       {path}")
    print_result(as_json, {"path": str(path)})


for tool in TOOLS:
    cli.add_command(tool)


def _recipe(path: str, overrides: tuple[str, ...], dry_run: bool):
    from pipelines.recipe_file import load_recipe

    config = load_recipe(path, overrides)
    if dry_run:
        _print_plan(config)
    return config


def _checkpoint_recipe(checkpoint: str, recipe: str | None, overrides: tuple[str, ...], dry_run: bool):
    if recipe is not None:
        return _recipe(recipe, overrides, dry_run)
    from dit.checkpoint import load_checkpoint
    from pipelines.evaluate import checkpoint_recipe

    config = checkpoint_recipe(load_checkpoint(checkpoint), overrides)
    if dry_run:
        _print_plan(config)
    return config


def _print_plan(config) -> None:
    """The resolved recipe, and end: a dry run does nothing else."""
    _print_resolved(config)
    sys.exit(OK)


def _print_resolved(config) -> None:
    from pipelines.recipe_file import resolved

    click.echo(json.dumps(resolved(config), indent=2))


def _print_encode_plan(config, as_json: bool) -> None:
    """The resolved recipe, and what there is to encode."""
    _print_resolved(config)
    from pipelines.encode_plan import plan_encode, plan_lines

    plan = plan_encode(config)
    for name, text in plan_lines(plan, config):
        click.echo(f"{name:<12} {text}")
    print_result(as_json, {**asdict(plan), "bytes": plan.bytes, "seconds": plan.seconds})


def _with_context(job, config, address):
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        return job(config, context=context)


def _print_report(report, folder: Path, as_json: bool, uri: str) -> None:
    below = Path(os.path.relpath(folder))
    shown = folder if ".." in below.parts else below  # a job's working directory is not its user's
    click.echo(f"\n{report.table()}")
    for warning in report.warnings:
        click.echo(f"note: {warning}")
    click.echo(f"report       {shown / 'report.json'}")
    for name in report.artifacts:
        click.echo(f"{name:<12} {shown / report.artifacts[name]}")
    click.echo(f"MLflow UI    raydit ui{'' if uri.startswith('sqlite') else f'   (on {uri})'}")
    print_result(as_json, json.loads(report.to_json()))


def main() -> None:
    """Entry point: exit codes are 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; the same command goes on from here", INTERRUPTED)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"{error}; free some space, then the same command goes on from here", FAILED)
        if not _is_ours(error):
            raise
        _fail(str(error), FAILED if isinstance(error, FloatingPointError | ConnectionError) else BAD_INPUT)


def _fail(message: str, code: int) -> None:
    click.echo(f"\nraydit: {message}", err=True)
    sys.exit(code)


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised on purpose, by a line of ours: its message is for the user, its trace is not."""
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return False
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    return module.split(".")[0] in PACKAGES


if __name__ == "__main__":
    main()
