"""`raydit latents`: verify a latent data set, or show its content."""

import sys
from dataclasses import asdict

import click

from pipelines.cli.options import FAILED, OK, json_option
from pipelines.cli.output import echo, print_line, print_result


@click.group()
def latents() -> None:
    """Verify a latent data set, and look into it."""


@latents.command()
@click.argument("path", type=click.Path(file_okay=False))
@click.option(
    "--sample", type=click.IntRange(min=1), default=64, show_default=True, help="Number of images to encode again."
)
@json_option
def verify(path: str, sample: int, as_json: bool) -> None:
    """Compare the data set at PATH with its manifest and its images; exit code 1 if anything differs."""
    from cluster.doctor import render
    from pipelines.latents.dataset import LatentDataset
    from pipelines.latents.verify import TOPICS, verify

    checks = []
    for check in verify(LatentDataset.open(path), sample=sample):
        checks.append(check)
        if not as_json:
            echo(render([check], max(map(len, TOPICS))))
    ok = all(check.ok for check in checks)
    print_result(as_json, {"ok": ok, "checks": [asdict(check) for check in checks]})
    sys.exit(OK if ok else FAILED)


@latents.command()
@click.argument("path", type=click.Path(file_okay=False))
@click.option("--out", type=click.Path(dir_okay=False), help="PNG file to write, with decoded images of each class.")
@json_option
def show(path: str, out: str | None, as_json: bool) -> None:
    """Describe the data set at PATH, and decode some of its images."""
    from pipelines.latents.dataset import LatentDataset
    from pipelines.latents.show import JSON_KEYS, show

    lines = show(LatentDataset.open(path), out)
    for name, text in lines:
        print_line(name, text)
    print_result(as_json, {JSON_KEYS.get(name, name): text for name, text in lines})
