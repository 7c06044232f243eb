"""The `raydit` command: parses, calls a job, prints. Everything heavy is imported by the command that needs it."""

import errno
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
PACKAGES = ("pipelines", "dit", "evaluation", "cluster")

recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False))
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's field.")
address_option = click.option("--address", help="Ray cluster to use; default: RAY_ADDRESS, else a local Ray.")
server_option = click.option(
    "--address", help="http://HOST:8265 of the cluster's head; default: RAY_API_SERVER_ADDRESS, else this machine's."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on the last line.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the resolved recipe and touch nothing.")


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
    _result(as_json, {"id": handle.id, "path": str(handle.folder())})


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
    _result(as_json, {"path": str(dataset.path), **counts})


@cli.command()
@job_options
def train(recipe, overrides, address, dry_run, as_json) -> None:
    """Train the model of RECIPE on its latents."""
    config = _recipe(recipe, overrides, dry_run)
    from pipelines.train import train

    checkpoint = _with_context(train, config, address)
    _result(as_json, {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest})


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
    _result(as_json, {"path": str(path)})


@cli.command(name="import")
@click.argument("source", metavar="FILE")
@click.argument("out", type=click.Path())
@click.option("--model", help="Named size that the weights must have, such as DiT-XL/2; default: recognised.")
@click.option("--autoencoder", help="Hub id or folder; default: stabilityai/sd-vae-ft-ema, or the pipeline's own.")
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
    from pipelines.interchange import import_checkpoint, import_summary

    checkpoint = import_checkpoint(
        source,
        out,
        model=model,
        objective=objective,
        numerics=numerics,
        autoencoder=autoencoder,
        overrides=overrides,
    )
    for line in import_summary(checkpoint):
        click.echo(f"import       {line}")
    _result(as_json, {"path": str(checkpoint.path), "digest": checkpoint.digest, "model": checkpoint.config["model"]})


@cli.command(name="export")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", type=click.Choice(["diffusers", "official"]), required=True, help="A folder, or a .pt file.")
@click.option("--weights", default="ema", show_default=True, help="Averaged (ema), or as trained (raw).")
@json_option
def export(checkpoint, out, format, weights, as_json) -> None:
    """Write CHECKPOINT as OUT, for diffusers' DiTPipeline or for the official code."""
    from pipelines.interchange import export_checkpoint, how_to_load

    path = export_checkpoint(checkpoint, out, format=format, weights=weights)
    click.echo(f"export       {path}\n             {how_to_load(path)}")
    _result(as_json, {"path": str(path)})


@cli.group()
def latents() -> None:
    """Look at a latent data set: is it whole, what is in it."""


@latents.command()
@click.argument("path", type=click.Path(file_okay=False))
@click.option("--sample", type=click.IntRange(min=1), default=64, show_default=True, help="Rows to encode once more.")
@json_option
def verify(path, sample, as_json) -> None:
    """Compare the data set at PATH with its manifest, itself and its images; exit code 1 if anything is wrong."""
    from cluster.doctor import render
    from pipelines.latent_checks import TOPICS, verify
    from pipelines.latents import LatentDataset

    checks = []
    for check in verify(LatentDataset.open(path), sample=sample):
        checks.append(check)
        if not as_json:
            click.echo(render([check], max(map(len, TOPICS))))
    ok = all(check.ok for check in checks)
    _result(as_json, {"ok": ok, "checks": [asdict(check) for check in checks]})
    sys.exit(OK if ok else FAILED)


@latents.command()
@click.argument("path", type=click.Path(file_okay=False))
@click.option("--out", type=click.Path(dir_okay=False), help="PNG to write, with a few rows of each class decoded.")
@json_option
def show(path, out, as_json) -> None:
    """Say what the data set at PATH holds, and decode some of it."""
    from pipelines.latent_view import show
    from pipelines.latents import LatentDataset

    lines = show(LatentDataset.open(path), Path(out) if out else None)
    for name, text in lines:
        click.echo(f"{name:<12} {text}")
    _result(as_json, dict(lines))


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@server_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the log until the job ends.")
@click.option("--pack/--no-pack", default=None, help="Send the working directory along; default: unless HOST is here.")
@click.option("--pip", is_flag=True, help="Send raydit too, and let a plain Ray cluster install what it needs.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(address, wait, pack, pip, command) -> None:
    """Run any raydit COMMAND as a Ray job: raydit submit -- run RECIPE."""
    from pipelines.submission import submit_command

    sys.exit(submit_command(list(command), address=address, wait=wait, pack=pack, pip=pip))


@cli.group()
def jobs() -> None:
    """Look after submitted jobs."""


@jobs.command("list")
@server_option
@json_option
def list_jobs(address, as_json) -> None:
    """All jobs, oldest first."""
    from pipelines.job_commands import print_jobs

    print_jobs(address, as_json)


@jobs.command()
@click.argument("job")
@server_option
@json_option
def status(job, address, as_json) -> None:
    """State of JOB, and where its MLflow runs are."""
    from pipelines.job_commands import print_status

    print_status(job, address, as_json)


@jobs.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until JOB ends; the exit code is its own.")
@server_option
def logs(job, follow, address) -> None:
    """What JOB has printed."""
    from pipelines.job_commands import print_log

    sys.exit(print_log(job, address, follow))


@jobs.command()
@click.argument("job")
@server_option
@json_option
def stop(job, address, as_json) -> None:
    """End JOB as Ctrl-C does; the same command goes on from there."""
    from pipelines.job_commands import stop_job

    stop_job(job, address, as_json)


@cli.command()
@click.option("--port", type=int, default=5000, show_default=True)
@set_option
def ui(port, overrides) -> None:
    """Serve the MLflow UI on the store in use, at 127.0.0.1."""
    from pipelines.tracking import serve_ui, tracking_uri

    given = dict(override.split("=", 1) for override in overrides)
    serve_ui(tracking_uri(given.get("tracking.uri", "")), port)


@cli.command()
@address_option
@click.option("--output", default=".", show_default=True, help="Folder or URI where runs will write.")
@json_option
def doctor(address, output, as_json) -> None:
    """Check versions, devices, Ray, storage, tracking and weights; say what to do where something is red."""
    from pipelines.doctor import examine

    sys.exit(OK if examine(address, output, as_json) else FAILED)


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
    _result(as_json, {**asdict(plan), "bytes": plan.bytes, "seconds": plan.seconds})


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
    click.echo(f"samples      {shown / report.artifacts['samples']}")
    click.echo(f"MLflow UI    raydit ui{'' if uri.startswith('sqlite') else f'   (on {uri})'}")
    _result(as_json, json.loads(report.to_json()))


def _result(as_json: bool, result: dict) -> None:
    if as_json:
        click.echo(json.dumps(result))


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
