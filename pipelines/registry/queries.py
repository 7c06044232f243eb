"""Queries for `raydit runs`: runs and checkpoints that MLflow knows, as plain data."""

import ast
import json
from collections.abc import Iterable
from typing import Any

from evaluation.metric_names import MEAN_RATIO, is_of_extractor, parse_metric_name
from evaluation.protocol import EvaluationProtocol
from evaluation.ratios import same_held_out
from pipelines.registry.repeats import average_repeats, find_seeds, first_of_seeds
from pipelines.scoring.reports.log_report import REFERENCE
from pipelines.tracking import tags
from pipelines.tracking.experiments import find_experiment
from pipelines.tracking.lookup import connected_client, find_run, run_link
from pipelines.tracking.provenance import code_label
from pipelines.tracking.run_log import SCORE
from pipelines.tracking.searches import (
    all_pages,
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
ERROR = "eval_error/"
"""Prefix of the errors of an evaluation's metrics."""


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
    extractors = [name for name, each in _protocol_ids(runs[0]).items() if each == protocol_id] if runs else []
    return protocol_summary(runs[0], extractors[0]) if extractors else ""


def _protocol_ids(run: Any) -> dict[str, str]:
    """Return the protocol ids of a run by several extractors, by extractor; empty for one extractor."""
    return json.loads(run.data.tags.get(tags.PROTOCOLS, "{}"))


def find_extractor(run: Any, metric: str) -> str:
    """Return which of several extractors a metric of a run is by; empty if the run has one extractor."""
    return next((each for each in _protocol_ids(run) if is_of_extractor(metric, each)), "")


def list_runs(uri: str, *, experiment: str = "", stage: str = "", limit: int = 20) -> list[dict[str, Any]]:
    """Return summaries of the newest runs, newest first.

    experiment, stage: empty for all. Raises NotFound if there is no such experiment, and Unreachable if MLflow does
    not answer.
    """
    with connected_client(uri) as client:
        names = _experiments(client, uri, experiment)
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
    first = next(iter(_protocol_ids(run)), "")
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
    distances = [name for name in names if _kind(name) == "fd"]
    return sorted(distances, key=lambda name: -parse_metric_name(name).num_samples)[:1]


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


def best_checkpoints(uri: str, experiment: str, *, metric: str = "", protocol: str = "") -> dict[str, Any]:
    """Rank the checkpoints of an experiment by a metric, the best first.

    Only scores of one protocol are comparable, and of ratios only those to the same held-out images.

    metric: name without eval/, such as fid_50k; empty: the Frechet distance at the largest N. protocol: its id; empty:
    the one that scored most checkpoints, and of several such the newest, or the first of its repeats. A checkpoint that
    was scored with further seeds is ranked by their mean, see average_repeats. Raises NotFound if there are no scores,
    and InvalidInput for an unknown name of a metric.
    """
    if metric:
        parse_metric_name(metric)
    with connected_client(uri) as client:
        (number,) = _experiments(client, uri, experiment)
        query = tags.has(tags.STAGE, "evaluate")
        runs = list(search_runs(client, [number], query, "attributes.start_time DESC"))
        models = _all_models(client, number)
        commits = source_commits(client, models)
    by_id = {run.info.run_id: run for run in runs}
    scores = [
        {**score, "commit": commits[model.source_run_id]} for model in models for score in _scores(model, by_id, metric)
    ]
    scored: dict[str, set[str]] = {}  # a checkpoint that was scored several times by one protocol counts as one
    # Of protocols that scored equally many, the newest counts, and of one evaluation its first extractor's.
    for score in sorted(scores, key=lambda score: (-score["time"], _is_further(score, by_id))):
        scored.setdefault(score["protocol_id"], set()).add(score["digest"])
    protocols = {each: len(digests) for each, digests in scored.items()}
    summaries = {score["protocol_id"]: score["protocol"] for score in scores}
    seeds = find_seeds(scores, by_id)
    most = max(protocols.values(), default=0)
    newest = [each for each, count in protocols.items() if count == most]
    chosen = protocol or (first_of_seeds(newest[0], newest, seeds) if newest else "")
    if chosen not in protocols:
        wanted = " ".join(filter(None, (metric, chosen and f"by protocol {chosen}"))) or "of a checkpoint"
        found = f"scores by {', '.join(f'{each} ({summaries[each]})' for each in protocols)}" if protocols else "none"
        raise NotFound(
            f"no score {wanted} in experiment {experiment} at {uri}: found {found}",
            "at least one",
            "score a checkpoint: raydit evaluate CHECKPOINT",
        )
    name = metric or headline_metrics(score["metric"] for score in scores if score["protocol_id"] == chosen)[0]
    ranked = [score for score in scores if (score["protocol_id"], score["metric"]) == (chosen, name)]
    if parse_metric_name(name).kind.is_ratio:
        comparable = same_held_out(score["held_out"] for score in ranked)
        ranked = [score for score in ranked if score["held_out"] in comparable]
    ranked = average_repeats(ranked, scores, seeds)
    sign = -1 if parse_metric_name(name).kind.higher_is_better else 1
    ranked.sort(key=lambda score: (sign * score["value"], -score["time"]))
    once = {score["digest"]: score for score in reversed(ranked)}  # a repeated evaluation adds the same numbers again
    return {
        "metric": name,
        "protocol_id": chosen,
        "protocol": summaries[chosen],
        "higher_is_better": sign < 0,
        "checkpoints": [score for score in ranked if once[score["digest"]] is score],
        "other_protocols": {each: count for each, count in protocols.items() if each != chosen},
        "protocols": summaries,
    }


def _scores(model: Any, runs: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """Return every value of a metric that a checkpoint has, with the protocol of its run.

    Evaluations that found it defective are left out. metric: empty for all Frechet distances.
    """
    found = []
    for point in model.metrics or []:
        name, run = point.key.removeprefix(SCORE), runs.get(point.run_id)
        is_wanted = name == metric if metric else _kind(name) == "fd"
        if run is None or tags.DISQUALIFIED in run.data.tags or not point.key.startswith(SCORE) or not is_wanted:
            continue
        extractor = find_extractor(run, name)
        main = run.data.tags.get(tags.PROTOCOL_ID, "")
        protocol_id, said = _protocol_ids(run).get(extractor, main), protocol_summary(run, extractor)
        if _kind(name) == MEAN_RATIO.name:  # of several extractors' protocols, which it was logged with
            protocol_id, said = point.dataset_digest, point.dataset_name
        found.append(
            {
                **model_summary(model),
                "step": point.step,
                "metric": name,
                "value": point.value,
                "error": run.data.metrics.get(ERROR + name),
                "protocol_id": protocol_id,
                "protocol": said,
                "reference": _reference(run, extractor),
                "held_out": run.data.tags.get(tags.HELD_OUT_DIGEST, ""),
                "run": point.run_id,
                "time": point.timestamp,
            }
        )
    return found


def _is_further(score: dict[str, Any], runs: dict[str, Any]) -> bool:
    """Return whether a score is by another protocol than its run's first."""
    return score["protocol_id"] != runs[score["run"]].data.tags.get(tags.PROTOCOL_ID, "")


def _reference(run: Any, extractor: str) -> str:
    """Return the digest of the reference that a run's scores are of; empty if none is recorded.

    extractor: which of several extractors' reference; empty: there is one.
    """
    read = run.inputs.dataset_inputs if run.inputs else ()
    digests = {each.dataset.name: each.dataset.digest for each in read}
    return digests.get(f"{REFERENCE}-{extractor}", digests.get(REFERENCE, ""))


def _kind(name: str) -> str:
    """Return the kind of a metric from its name; empty if the name is not that of a metric."""
    try:
        return parse_metric_name(name).kind.name
    except ValueError:
        return ""


def _all_models(client: Any, experiment_id: str) -> list[Any]:
    return list(
        all_pages(lambda token: client.search_logged_models([experiment_id], max_results=100, page_token=token))
    )


def _experiments(client: Any, uri: str, name: str) -> dict[str, str]:
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
