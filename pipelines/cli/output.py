"""What commands print: aligned lines for people, and results for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from raydit.printable import one_line, printable

if TYPE_CHECKING:
    from evaluation.report import EvaluationReport
    from pipelines.config.recipe import Recipe


def echo(text: str) -> None:
    """Print a text of one or more lines; control characters in it are escaped."""
    click.echo(printable(text))


def print_line(title: str, text: str) -> None:
    """Print a line that begins with a title in a column of its own."""
    click.echo(f"{title:<12} {one_line(text)}")


def print_result(as_json: bool, result: Mapping[str, Any]) -> None:
    """Print the last line of a command with --json: its result as one line of JSON."""
    if as_json:
        click.echo(json.dumps(result))


def print_resolved(config: Recipe) -> None:
    """Print a resolved recipe as JSON; options that are not set are null or left out."""
    from pipelines.config.reader import resolved

    click.echo(json.dumps(resolved(config), indent=2))


def print_report(report: EvaluationReport, folder: str, as_json: bool, uri: str) -> None:
    """Print a report's metrics and warnings, and where its files and its MLflow UI are.

    folder: path or URI of the report's folder. uri: MLflow tracking URI.
    """
    from cluster import storage

    echo(f"\n{report.table()}")
    for warning in report.all_warnings:
        echo(f"note: {one_line(warning)}")
    print_line("report", shorten_path(storage.join(folder, "report.json")))
    for name in report.artifacts:
        print_line(name, shorten_path(storage.join(folder, report.artifacts[name])))
    print_line("MLflow UI", f"raydit ui{'' if uri.startswith('sqlite') else f'   (on {uri})'}")
    print_result(as_json, json.loads(report.to_json()))


def shorten_path(path: str) -> str:
    """Return a path below the working directory relative to it, and other paths and URIs unchanged.

    Only such paths: the working directory of a job is not that of the user who reads its log.
    """
    relative = os.path.relpath(path)
    return path if "://" in path or relative.startswith(os.pardir) else relative
