"""Commands of `raydit` that ask MLflow: runs, lineage, promote."""

import sys
import time
from datetime import datetime

import click

from pipelines.cli.options import FAILED, OK, json_option, print_result, store_option


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
    _print("run", f"{found['name']} ({found['id']}), {found['status'].lower()}, {started}, {took}")
    _print("experiment", found["experiment"])
    for title in ("parent", "children"):
        for other in found[title]:
            _print(title, f"{other['name']}  {other['status'].lower()}  {_listed(other)}")
    for read in found["inputs"]:
        _print("input", f"{read['name']} {read['digest'][:12]}")
    for model in found["models"]:
        gone = " (removed)" if model["removed"] else ""
        _print("model", f"{model['name']} {model['digest'][:12]} {model['checkpoint']}{gone}")
    for title in ("tags", "metrics", "params"):
        for key, value in sorted(found[title].items()):
            _print(title, f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}")
    if found["link"]:
        _print("link", found["link"])
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


@click.command()
@click.argument("checkpoint", required=False, type=click.Path())
@click.option("--name", help="Registered model that the checkpoint becomes a version of.")
@click.option("--alias", type=click.Choice(["champion", "challenger"]), default="champion", show_default=True)
@click.option("--protocol", help="Id of the one whose report decides, where there are several.")
@click.option("--rollback", metavar="NAME", help="Instead: give the alias of NAME back to who had it before.")
@store_option
@json_option
def promote(checkpoint, name, alias, protocol, rollback, store, as_json) -> None:
    """Register CHECKPOINT as champion, if its report is better than the champion's by more than the error."""
    if (rollback is None) == (checkpoint is None or name is None):
        raise click.UsageError("expected CHECKPOINT --name NAME, or --rollback NAME")
    from pipelines.registry import promotion
    from pipelines.tracking.store import tracking_uri

    if rollback is not None:
        said, given = promotion.rollback(tracking_uri(store), rollback, alias=alias), True
    else:
        said, given = promotion.promote_checkpoint(checkpoint, name, alias=alias, protocol_id=protocol, store=store)
    click.echo(f"promote      {said}")
    print_result(as_json, {"name": rollback or name, "alias": alias, "given": given, "found": said})


@click.command()
@click.argument("target", metavar="MODEL|RUN|LATENTS|CHECKPOINT", type=click.Path())
@click.option("--quick", is_flag=True, help="Compare sizes and what is recorded; read neither shards nor weights.")
@store_option
@json_option
def lineage(target, quick, store, as_json) -> None:
    """Print what TARGET was made from and what was made of it; exit code 1 where a digest no longer matches.

    A folder or URI of latents, any name of a checkpoint, models:/NAME@ALIAS, or an MLflow run by its id or name.
    """
    from pipelines.registry.lineage import lineage as chain_of

    chain = chain_of(target, store=store, quick=quick)
    for link in chain:
        digest = f" ({link.digest[:12]})" if link.digest else ""
        _print(link.kind, ", ".join([f"{link.name}{digest}", *link.facts]))
        for text in link.unknown:
            _print("", f"not compared: {text}")
        for text in link.broken:
            _print("", f"BROKEN: {text}")
    broken = sum(len(link.broken) for link in chain)
    click.echo(f"\nBROKEN in {broken} places" if broken else "\nunbroken: every recorded digest matches")
    print_result(as_json, {"ok": not broken, "chain": [link.to_dict() for link in chain]})
    sys.exit(FAILED if broken else OK)


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


def _print(title: str, text: str) -> None:
    click.echo(f"{title:<12} {text}")


RECORDS: tuple[click.Command, ...] = (runs, lineage, promote)
