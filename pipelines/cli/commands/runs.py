"""`raydit runs`: runs and checkpoints in MLflow, without a browser."""

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from pipelines.cli.options import FAILED, OK, json_option, store_option
from pipelines.cli.output import echo, print_line, print_result
from raydit.errors import RayditError


@click.group()
def runs() -> None:
    """Look up runs and checkpoints in MLflow, without a browser."""


@runs.command("list")
@click.argument("experiment", metavar="[EXPERIMENT|RECIPE]", default="")
@click.option("--stage", default="", help="List only runs of this stage, such as train.")
@click.option(
    "--limit",
    type=click.IntRange(min=1, max=1000),
    default=20,
    show_default=True,
    help="Number of newest runs.",
)
@store_option
@json_option
def list_(experiment: str, stage: str, limit: int, store: str, as_json: bool) -> None:
    """List runs with their main metrics, newest first."""
    from evaluation.text_table import align_columns
    from pipelines.registry.queries import list_runs

    name, uri = _experiment_and_store(experiment, store)
    found = list_runs(uri, experiment=name, stage=stage, limit=limit)
    rows = [["id", "run", "experiment", "status", "started", "took", "metrics"]]
    for run in found:
        rows.append(
            [run["id"][:8], run["name"], run["experiment"], run["status"].lower(), *_times(run), _join_metrics(run)]
        )
    echo("\n".join(align_columns(rows)) if found else f"no runs at {uri}")
    print_result(as_json, {"store": uri, "runs": found})


@runs.command()
@click.argument("run")
@store_option
@json_option
def show(run: str, store: str, as_json: bool) -> None:
    """Print everything about RUN: its settings, metrics, models, parent and children.

    RUN is an id, the beginning of one, or a name.
    """
    from pipelines.registry.queries import show_run
    from pipelines.tracking.store import tracking_uri

    found = show_run(tracking_uri(store), run)
    started, took = _times(found)
    print_line("run", f"{found['name']} ({found['id']}), {found['status'].lower()}, {started}, {took}")
    print_line("experiment", found["experiment"])
    if found["protocol_id"]:
        print_line("protocol", f"{found['protocol_id']} ({found['protocol']})")
    if found["commit"]:
        print_line("commit", f"{found['commit']}{' with uncommitted changes' if found['code_dirty'] else ''}")
    for title in ("parent", "children"):
        for other in found[title]:
            print_line(title, f"{other['name']}  {other['status'].lower()}  {_join_metrics(other)}")
    for dataset in found["inputs"]:
        print_line("input", f"{dataset['name']} {dataset['digest'][:12]}")
    for model in found["models"]:
        removed = " (removed)" if model["removed"] else ""
        by = f" by commit {model['commit']}" if model["commit"] else ""
        print_line("model", f"{model['name']} {model['digest'][:12]} {model['checkpoint']}{by}{removed}")
    for title in ("tags", "metrics", "params"):
        for key, value in sorted(found[title].items()):
            print_line(title, f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}")
    if found["link"]:
        print_line("link", found["link"])
    print_result(as_json, found)


@runs.command()
@click.argument("experiment", metavar="EXPERIMENT|RECIPE")
@click.option("--metric", default="", help="Metric, such as fid_50k; default: the Frechet distance at the largest N.")
@click.option("--protocol", default="", help="Protocol id; default: the one with most scored checkpoints.")
@store_option
@json_option
def best(experiment: str, metric: str, protocol: str, store: str, as_json: bool) -> None:
    """List checkpoints by a metric, best first.

    Only checkpoints that were scored with the same protocol are listed. Those that were scored with several seeds
    (raydit evaluate --repeats) are ranked by the mean, which is shown with its standard error.
    """
    from evaluation.text_table import align_columns
    from pipelines.registry.best import best_checkpoints

    name, uri = _experiment_and_store(experiment, store)
    found = best_checkpoints(uri, name, metric=metric, protocol=protocol)
    rows = [
        [
            f"{found['metric']} ({'higher' if found['higher_is_better'] else 'lower'} is better)",
            "checkpoint",
            "commit",
            "",
        ]
    ]
    for score in found["checkpoints"]:
        error = "" if score["error"] is None else f" +- {score['error']:.3g}"
        over = f" ({score['seeds']} seeds)" if score["seeds"] > 1 else ""
        removed = "removed" if score["removed"] else ""
        rows.append([f"{score['value']:.6g}{error}{over}", score["checkpoint"], score["commit"], removed])
    echo("\n".join(align_columns(rows)))
    print_line("protocol", f"{found['protocol_id']} ({found['protocol']})")
    for other, count in found["other_protocols"].items():
        print_line("not shown", f"{count} scored by {found['protocols'][other]}: --protocol {other}")
    print_result(as_json, found)


@runs.command()
@click.argument("output", metavar="[OUTPUT|RECIPE]", default="", type=click.Path())
@json_option
def deliver(output: str, as_json: bool) -> None:
    """Deliver pending journal entries of OUTPUT to MLflow.

    Without OUTPUT: of all outputs in this folder and two levels below. Entries that MLflow refused earlier are sent
    again. Exit code 1 if entries still wait or are refused, or if one of several outputs cannot be delivered.
    """
    from pathlib import Path

    from pipelines.tracking.undelivered import find_outputs

    uri, outputs = "", [output] if output else find_outputs(Path())
    if output.endswith(".toml"):
        from pipelines.config.reader import load_recipe

        config = load_recipe(output)
        uri, outputs = config.tracking.uri, [config.output]
    found, failed = [], []
    for each in outputs:
        try:
            found += _deliver_output(each, uri)
        except RayditError as error:
            if output:
                raise
            print_line("deliver", f"{each} cannot be delivered: {error}")
            failed.append({"output": each, "error": str(error)})
    if not found and not failed:
        print_line("deliver", f"nothing waits in {', '.join(outputs) or 'any output here'}")
    print_result(as_json, {"journals": found, "failed": failed})
    sys.exit(FAILED if failed or any(each["waiting"] or each["refused"] for each in found) else OK)


def _deliver_output(output: str, uri: str) -> list[dict[str, Any]]:
    """Deliver what waits in the journals of an output, and return what became of each. Raises RayditError."""
    from pipelines.tracking.undelivered import deliver_journal, find_journals

    found = []
    for journal in [journal for journal in find_journals(output, uri) if journal.waits]:
        done = deliver_journal(output, journal)
        found.append({"output": output, **done._asdict()})
        left = f", {done.waiting:,} still wait" if done.waiting else ""
        left += f", {done.refused:,} refused (see {journal.refused})" if done.refused else ""
        print_line("deliver", f"{done.delivered:,} entries of {output} to {done.uri}{left}")
    return found


@runs.command()
@click.argument("output", metavar="[OUTPUT|RECIPE]", default="", type=click.Path())
@store_option
@json_option
def relocate(output: str, store: str, as_json: bool) -> None:
    """Repair a database that was moved or copied with its project.

    Its artifacts, outputs and checkpoints are then looked for where they are now, and nothing is written to the old
    folder. Give OUTPUT for an output that the database does not know yet.
    """
    from pipelines.tracking.relocation import relocate
    from pipelines.tracking.store import tracking_uri

    uri, outputs = tracking_uri(store), [output] if output else []
    if output.endswith(".toml"):
        from pipelines.config.reader import load_recipe

        config = load_recipe(output)
        uri, outputs = tracking_uri(store or config.tracking.uri), [config.output]
    found = relocate(uri, outputs)
    for done in found:
        repaired = f"artifact locations: {done.artifacts:,}, other paths: {done.paths:,}, journals: {done.journals:,}"
        print_line("relocate", f"{uri} leads to {done.new} instead of {done.old} ({repaired})")
    if not found:
        print_line("relocate", f"{uri} has not moved, or its artifacts lie elsewhere on purpose")
    print_result(as_json, {"store": uri, "relocated": [done._asdict() for done in found]})


def _experiment_and_store(name: str, store: str) -> tuple[str, str]:
    """Return an experiment's name, which may be given by a recipe's path, and the tracking URI to look it up at."""
    from pipelines.tracking.store import tracking_uri

    if not name.endswith(".toml"):
        return name, tracking_uri(store)
    from pipelines.config.reader import load_recipe

    config = load_recipe(name)
    return config.name, tracking_uri(store or config.tracking.uri)


def _times(run: Mapping[str, Any]) -> tuple[str, str]:
    """Return when a run started and how long it took, or has been running."""
    started = datetime.fromtimestamp(run["start"] / 1000).strftime("%Y-%m-%d %H:%M")
    seconds = run["seconds"] if run["seconds"] is not None else time.time() - run["start"] / 1000
    return started, f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _join_metrics(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in run["metrics"].items())
