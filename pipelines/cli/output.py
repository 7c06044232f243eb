"""What commands print: results for scripts, recipes, reports."""

import json
import os

import click


def print_report(report, folder: str, as_json: bool, uri: str) -> None:
    """The numbers, what to know of them, and where everything is."""
    from cluster import storage

    click.echo(f"\n{report.table()}")
    for warning in report.warnings:
        click.echo(f"note: {warning}")
    click.echo(f"report       {shown(storage.join(folder, 'report.json'))}")
    for name in report.artifacts:
        click.echo(f"{name:<12} {shown(storage.join(folder, report.artifacts[name]))}")
    click.echo(f"MLflow UI    raydit ui{'' if uri.startswith('sqlite') else f'   (on {uri})'}")
    print_result(as_json, json.loads(report.to_json()))


def shown(place: str) -> str:
    """Relative to the working directory where it lies below: a job's working directory is not its user's."""
    below = os.path.relpath(place)
    return place if "://" in place or below.startswith(os.pardir) else below


def print_result(as_json: bool, result: dict) -> None:
    """The last line of a command, where --json asks for it."""
    if as_json:
        click.echo(json.dumps(result))


def print_resolved(config) -> None:
    """The recipe with every default filled in."""
    from pipelines.config.reader import resolved

    click.echo(json.dumps(resolved(config), indent=2))


def print_line(title: str, text: str) -> None:
    click.echo(f"{title:<12} {text}")
