"""`raydit latents`: look at a latent data set."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from pipelines.cli.options import FAILED, OK, json_option
from pipelines.cli.output import print_result


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
