"""Queries for `raydit runs`: runs and checkpoints that MLflow knows, as plain data."""

import ast
import json
from collections.abc import Iterable
from typing import Any

from evaluation.metric_names import is_of_extractor, parse_metric_name
from evaluation.protocol import EvaluationProtocol
from pipelines.tracking import tags
from pipelines.tracking.experiments import find_experiment
from pipelines.tracking.lookup import connected_client, find_run, run_link
from pipelines.tracking.provenance import code_label
from pipelines.tracking.run_log import SCORE
from pipelines.tracking.searches import (
    experiment_ids,
    find_model,
    find_run_of_id,
    search_experiments,
    search_runs,
)
from pipelines.tracking.store import is_unavailable
from raydit.errors import NotFound

MAIN_METRICS = (
    "autoencoder/psnr",
    "encode/images",
    "encode/images_per_second",
    "train/loss",
    "train/images_per_second",
    "train/mfu",
)
"""Metrics in the summary of a run; an evaluation adds its Frechet distance at the largest N."""


def protocol_summary(run: Any, extractor: str = "") -> str:
    """Return what the protocol of an evaluation's run says, in a few words; empty if it is unknown.

    extractor: which of several extractors' protocol; empty: the first one's. Runs of older versions have no tag for it,
    but the protocol's fields as params.
    """
    if tags.PROTOCOL in run.data.tags:
        summary = run.data.tags[tags.PROTOCOL]
        return f"{summary.rpartition(', ')[0]}, {extractor}" if extractor else summary
    start = "protocol."
    params = {name.removeprefix(start): value for name, value in run.data.params.items() if name.startswith(start)}
    unset: dict[str, Any] = {"cfg_channels": None, "cfg_interval": None}
    try:
        return EvaluationProtocol.from_dict(unset | {name: _value(text) for name, text in params.items()}).summary
    except (TypeError, ValueError):
        return ""


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def find_protocol(client: Any, protocol_id: str) -> str:
    """Return what a protocol says, in a few words, from any run that scored by it; empty if there is none."""
    experiments = experiment_ids(client)
    runs = client.search_runs(experiments, tags.has(tags.PROTOCOL_ID, protocol_id), max_results=1)
    if runs:
        return protocol_summary(runs[0])
    runs = client.search_runs(experiments, f"tags.`{tags.PROTOCOLS}` LIKE '%{protocol_id}%'", max_results=1)
    extractors = [name for name, each in protocol_ids(runs[0]).items() if each == protocol_id] if runs else []
    return protocol_summary(runs[0], extractors[0]) if extractors else ""


def protocol_ids(run: Any) -> dict[str, str]:
    """Return the protocol ids of a run by several extractors, by extractor; empty for one extractor."""
    return json.loads(run.data.tags.get(tags.PROTOCOLS, "{}"))


def find_extractor(run: Any, metric: str) -> str:
    """Return which of several extractors a metric of a run is by; empty if the run has one extractor."""
    return next((each for each in protocol_ids(run) if is_of_extractor(metric, each)), "")


def list_runs(uri: str, *, experiment: str = "", stage: str = "", limit: int = 20) -> list[dict[str, Any]]:
    """Return summaries of the newest runs, newest first.

    experiment, stage: empty for all. Raises NotFound if there is no such experiment, and Unreachable if MLflow does
    not answer.
    """
    with connected_client(uri) as client:
        names = experiments_by_id(client, uri, experiment)
        query = tags.has(tags.STAGE, stage) if stage else ""
        order = ["attributes.start_time DESC"]
        runs = client.search_runs(list(names), query, max_results=limit, order_by=order) if names else []
    return [summary(run, uri, names[run.info.experiment_id]) for run in runs]


def summary(run: Any, uri: str, experiment: str) -> dict[str, Any]:
    """Summarise a run: start in milliseconds since 1970, duration in seconds or None while it runs."""
    stage = run.data.tags.get(tags.STAGE, "")
    ended = None if run.info.status == "RUNNING" else run.info.end_time  # one that was resumed keeps its earlier end
    # A training has the scores of its checkpoints as well, each of which is in the summary of its own evaluation.
    metrics = {
        name: value for name, value in run.data.metrics.items() if stage != "train" or not name.startswith(SCORE)
    }
    first = next(iter(protocol_ids(run)), "")
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "experiment": experiment,
        "stage": stage,
        "status": run.info.status,
        "start": run.info.start_time,
        "seconds": (ended - run.info.start_time) / 1000 if ended else None,
        "metrics": main_metrics(metrics, first),
        "link": run_link(uri, run.info.experiment_id, run.info.run_id),
    }


def main_metrics(metrics: dict[str, float], extractor: str = "") -> dict[str, float]:
    """Choose the metrics that belong into a summary. extractor: the first of several; empty: there is one."""
    chosen = {name: metrics[name] for name in MAIN_METRICS if name in metrics}
    scores = [name.removeprefix(SCORE) for name in metrics if name.startswith(SCORE)]
    scores = [name for name in scores if not extractor or is_of_extractor(name, extractor)]
    return chosen | {f"{SCORE}{name}": metrics[f"{SCORE}{name}"] for name in headline_metrics(scores)}


def headline_metrics(names: Iterable[str]) -> list[str]:
    """Return the name of the Frechet distance at the largest N in a list; an empty list if there is none."""
    distances = [name for name in names if metric_kind(name) == "fd"]
    return sorted(distances, key=lambda name: -parse_metric_name(name).num_samples)[:1]


def metric_kind(name: str) -> str:
    """Return the kind of a metric from its name; empty if the name is not that of a metric."""
    try:
        return parse_metric_name(name).kind.name
    except ValueError:
        return ""


def show_run(uri: str, name: str) -> dict[str, Any]:
    """Return everything about one run, given by its id, its name, or the beginning of its id if that is unique.

    Raises NotFound if there is none, and InvalidInput if there are several.
    """
    with connected_client(uri) as client:
        run = find_run(client, uri, name)
        experiment = client.get_experiment(run.info.experiment_id).name
        parent = run.data.tags.get(tags.PARENT_RUN)
        query = tags.has(tags.PARENT_RUN, run.info.run_id)
        children = list(search_runs(client, [run.info.experiment_id], query, "attributes.start_time"))
        outputs = list(run.outputs.model_outputs) if run.outputs else []
        models = [model for output in outputs if (model := find_model(client, output.model_id))]
        commits = source_commits(client, models)
        found = find_run_of_id(client, parent) if parent else None  # `mlflow gc` may have removed it
    return {
        **summary(run, uri, experiment),
        "protocol_id": run.data.tags.get(tags.PROTOCOL_ID, ""),
        "protocol": protocol_summary(run),
        "commit": run.data.tags.get(tags.COMMIT, ""),
        "code_dirty": run.data.tags.get(tags.CODE_DIRTY) == "true",
        "description": run.data.tags.get(tags.DESCRIPTION, ""),
        "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "inputs": [
            {"name": read.dataset.name, "digest": read.dataset.digest, "source": read.dataset.source}
            for read in run.inputs.dataset_inputs
        ],
        "models": [{**model_summary(model), "commit": commits[model.source_run_id]} for model in models],
        "parent": [summary(found, uri, experiment)] if found else [],
        "children": [summary(each, uri, experiment) for each in children],
    }


def model_summary(model: Any) -> dict[str, Any]:
    """Summarise a LoggedModel as the checkpoint that it stands for."""
    return {
        "model": model.model_id,
        "name": model.name,
        "checkpoint": model.tags.get(tags.CHECKPOINT, ""),
        "digest": model.tags.get(tags.CHECKPOINT_DIGEST, ""),
        "removed": tags.REMOVED in model.tags,
    }


def source_commits(client: Any, models: Iterable[Any]) -> dict[str, str]:
    """Return the commits of the runs that logged some models, by the runs' ids; empty where a run is gone."""
    commits = {}
    for run_id in {model.source_run_id for model in models}:
        try:
            commits[run_id] = code_label(client.get_run(run_id).data.tags) if run_id else ""
        except Exception as error:
            if is_unavailable(error):
                raise
            commits[run_id] = ""
    return commits


def experiments_by_id(client: Any, uri: str, name: str) -> dict[str, str]:
    """Return experiment names by id: all of them, or the named one only."""
    if not name:
        return {each.experiment_id: each.name for each in search_experiments(client)}
    found = find_experiment(client, name)
    if found is None:
        known = ", ".join(sorted(each.name for each in search_experiments(client))) or "none"
        raise NotFound(
            f"no experiment {name} at {uri}: found {known}",
            "the name of an experiment, or a recipe",
            "name one of those, or set tracking.uri to the store that holds it",
        )
    return {found.experiment_id: found.name}
