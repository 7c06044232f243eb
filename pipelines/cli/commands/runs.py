"""`raydit runs`: what MLflow knows of runs and checkpoints."""

import time
from datetime import datetime

import click

from pipelines.cli.options import json_option, store_option
from pipelines.cli.output import print_line, print_result


@click.group()
def runs() -> None:
    """What MLflow knows of runs and checkpoints, without a browser."""


@runs.command("list")
@click.argument("experiment", metavar="[EXPERIMENT|RECIPE]", default="")
@click.option("--stage", default="", help="Only runs of this stage, such as train.")
@click.option("--limit", type=click.IntRange(min=1, max=1000), default=20, show_default=True, help="Newest runs only.")
@store_option
@json_option
def list_(experiment, stage, limit, store, as_json) -> None:
    """Runs, newest first, with their main metrics."""
    from evaluation.report import align_columns
    from pipelines.registry.queries import list_runs

    name, uri = _experiment(experiment, store)
    found = list_runs(uri, experiment=name, stage=stage, limit=limit)
    rows = [["run", "experiment", "status", "started", "took", "metrics"]]
    rows += [[run["name"], run["experiment"], run["status"].lower(), *_when(run), _listed(run)] for run in found]
    click.echo("\n".join(align_columns(rows)) if found else f"no runs at {uri}")
    print_result(as_json, {"store": uri, "runs": found})


@runs.command()
@click.argument("run")
@store_option
@json_option
def show(run, store, as_json) -> None:
    """Everything about RUN, named by its id or its name: settings, metrics, models, neighbours."""
    from pipelines.registry.queries import show_run
    from pipelines.tracking.store import tracking_uri

    found = show_run(tracking_uri(store), run)
    started, took = _when(found)
    print_line("run", f"{found['name']} ({found['id']}), {found['status'].lower()}, {started}, {took}")
    print_line("experiment", found["experiment"])
    for title in ("parent", "children"):
        for other in found[title]:
            print_line(title, f"{other['name']}  {other['status'].lower()}  {_listed(other)}")
    for read in found["inputs"]:
        print_line("input", f"{read['name']} {read['digest'][:12]}")
    for model in found["models"]:
        gone = " (removed)" if model["removed"] else ""
        print_line("model", f"{model['name']} {model['digest'][:12]} {model['checkpoint']}{gone}")
    for title in ("tags", "metrics", "params"):
        for key, value in sorted(found[title].items()):
            print_line(title, f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}")
    if found["link"]:
        print_line("link", found["link"])
    print_result(as_json, found)


@runs.command()
@click.argument("experiment", metavar="EXPERIMENT|RECIPE")
@click.option("--metric", default="", help="Such as fid_50k; default: the Frechet distance at the largest N.")
@click.option("--protocol", default="", help="Id of one; default: that by which most checkpoints were scored.")
@store_option
@json_option
def best(experiment, metric, protocol, store, as_json) -> None:
    """Checkpoints by a metric, the best first: only those that were scored by one protocol."""
    from evaluation.report import align_columns
    from pipelines.registry.queries import best_checkpoints

    name, uri = _experiment(experiment, store)
    found = best_checkpoints(uri, name, metric=metric, protocol=protocol)
    rows = [[f"{found['metric']} ({'higher' if found['higher_is_better'] else 'lower'} is better)", "checkpoint", ""]]
    for score in found["checkpoints"]:
        error = "" if score["error"] is None else f" +- {score['error']:.3g}"
        gone = "removed" if score["removed"] else ""
        rows.append([f"{score['value']:.6g}{error}", score["checkpoint"], gone])
    click.echo("\n".join(align_columns(rows)))
    click.echo(f"protocol     {found['protocol_id']}")
    for other, count in found["other_protocols"].items():
        click.echo(f"not shown    {count} scored by protocol {other}: --protocol {other}")
    print_result(as_json, found)


def _experiment(name: str, store: str) -> tuple[str, str]:
    """Name of an experiment, given as it is or by its recipe, and the store to look it up in."""
    from pipelines.tracking.store import tracking_uri

    if not name.endswith(".toml"):
        return name, tracking_uri(store)
    from pipelines.config.reader import load_recipe

    config = load_recipe(name)
    return config.name, tracking_uri(store or config.tracking.uri)


def _when(run: dict) -> tuple[str, str]:
    started = datetime.fromtimestamp(run["start"] / 1000).strftime("%Y-%m-%d %H:%M")
    seconds = run["seconds"] if run["seconds"] is not None else time.time() - run["start"] / 1000
    took = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return started, took


def _listed(run: dict) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in run["metrics"].items())
