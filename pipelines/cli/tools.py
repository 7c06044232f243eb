"""Commands of `raydit` beside the stages: plans, foreign weights, latents, jobs, the UI and the doctor."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from pipelines.cli.options import FAILED, OK, json_option, print_result, recipe_argument, server_option, set_option


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


@click.command()
@recipe_argument
@set_option
@click.option("--cluster", metavar="NxDEVICE", help="Accelerators to plan for, such as 8xH100; default: this machine.")
@click.option("--images", type=click.IntRange(min=1), help="Number of images, where they are not on this machine.")
@click.option("--classes", type=click.IntRange(min=0), default=1000, show_default=True, help="With --images.")
@click.option("--measured", multiple=True, metavar="STAGE=IMAGES/S", help="Speed of a stage that you have measured.")
@click.option("--price", type=click.FloatRange(min=0), help="Dollars per hour and device; default: a list price.")
@json_option
def plan(recipe, overrides, cluster, images, classes, measured, price, as_json) -> None:
    """Print the memory, bytes, FLOPs, hours and cost of the stages of RECIPE, without running any."""
    from pipelines.config.reader import load_recipe
    from pipelines.planning.hardware import parse_cluster
    from pipelines.planning.networks import resolve_networks
    from pipelines.planning.plan import count_images, make_plan, parse_speeds
    from pipelines.planning.render import plan_json, plan_lines

    config, speeds = load_recipe(recipe, overrides), parse_speeds(measured)
    counted = count_images(config, images, classes)
    if cluster:
        hardware = parse_cluster(cluster, price=price)
    else:
        from pipelines.planning.measure import measure_this_machine

        hardware = measure_this_machine(config, resolve_networks(config, counted.classes))
    keep = frozenset(override.partition("=")[0].strip() for override in overrides)
    made = make_plan(config, hardware, counted, keep=keep, images_per_second=speeds)
    for line in plan_lines(made):
        click.echo(line)
    print_result(as_json, plan_json(made))


@click.group()
def latents() -> None:
    """Look at a latent data set: is it whole, what is in it."""


@latents.command()
@click.argument("path", type=click.Path(file_okay=False))
@click.option("--sample", type=click.IntRange(min=1), default=64, show_default=True, help="Rows to encode once more.")
@json_option
def verify(path, sample, as_json) -> None:
    """Compare the data set at PATH with its manifest, itself and its images; exit code 1 if anything is wrong."""
    from cluster.doctor import render
    from pipelines.latents.dataset import LatentDataset
    from pipelines.latents.verify import TOPICS, verify

    checks = []
    for check in verify(LatentDataset.open(path), sample=sample):
        checks.append(check)
        if not as_json:
            click.echo(render([check], max(map(len, TOPICS))))
    ok = all(check.ok for check in checks)
    print_result(as_json, {"ok": ok, "checks": [asdict(check) for check in checks]})
    sys.exit(OK if ok else FAILED)


@latents.command()
@click.argument("path", type=click.Path(file_okay=False))
@click.option("--out", type=click.Path(dir_okay=False), help="PNG to write, with a few rows of each class decoded.")
@json_option
def show(path, out, as_json) -> None:
    """Say what the data set at PATH holds, and decode some of it."""
    from pipelines.latents.dataset import LatentDataset
    from pipelines.latents.show import show

    lines = show(LatentDataset.open(path), Path(out) if out else None)
    for name, text in lines:
        click.echo(f"{name:<12} {text}")
    print_result(as_json, dict(lines))


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@server_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Follow the log until the job ends.")
@click.option("--pack/--no-pack", default=None, help="Send the working directory along; default: unless HOST is here.")
@click.option("--pip", is_flag=True, help="Send raydit too, and let a plain Ray cluster install what it needs.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(address, wait, pack, pip, command) -> None:
    """Run any raydit COMMAND as a Ray job: raydit submit -- run RECIPE."""
    from pipelines.cli.command_line import CommandLine
    from pipelines.cli.submission import submit_command

    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group), "submit is one of raydit's commands"
    given = CommandLine.read(root, list(command))
    sys.exit(submit_command(given, address=address, wait=wait, pack=pack, pip=pip))


@click.group()
def jobs() -> None:
    """Look after submitted jobs."""


@jobs.command("list")
@server_option
@json_option
def list_jobs(address, as_json) -> None:
    """All jobs, oldest first."""
    from pipelines.cli.jobs import print_jobs

    print_jobs(address, as_json)


@jobs.command()
@click.argument("job")
@server_option
@json_option
def status(job, address, as_json) -> None:
    """State of JOB, and where its MLflow runs are."""
    from pipelines.cli.jobs import print_status

    print_status(job, address, as_json)


@jobs.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until JOB ends; the exit code is its own.")
@server_option
def logs(job, follow, address) -> None:
    """What JOB has printed."""
    from pipelines.cli.jobs import print_log

    sys.exit(print_log(job, address, follow))


@jobs.command()
@click.argument("job")
@server_option
@json_option
def stop(job, address, as_json) -> None:
    """End JOB as Ctrl-C does; the same command goes on from there."""
    from pipelines.cli.jobs import stop_job

    stop_job(job, address, as_json)


@click.command()
@click.option("--port", type=int, default=5000, show_default=True, help="The first of ten that are looked at.")
@set_option
def ui(port, overrides) -> None:
    """Print the address of the MLflow UI on the store in use; start it, at 127.0.0.1, where it does not run."""
    from pipelines.cli.ui import serve_ui
    from pipelines.tracking.store import tracking_uri

    given = dict(override.split("=", 1) for override in overrides)
    serve_ui(tracking_uri(given.get("tracking.uri", "")), port)


@click.command()
@click.option("--address", help="Ray cluster to check: HOST:PORT, or http://HOST:8265 of its head.")
@click.option(
    "--output", type=click.Path(), default=".", show_default=True, help="Folder or URI where runs will write."
)
@json_option
def doctor(address, output, as_json) -> None:
    """Check versions, devices, Ray, storage, tracking and weights; say what to do where something is red."""
    from pipelines.cli.doctor import examine

    sys.exit(OK if examine(address, output, as_json) else FAILED)


TOOLS: tuple[click.Command, ...] = (plan, import_, export, latents, submit, jobs, ui, doctor)
