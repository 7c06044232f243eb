"""What MLflow knows of runs and checkpoints, as `raydit runs` prints it: plain data, asked for directly."""

from collections.abc import Iterable
from typing import Any

from evaluation.protocol import HIGHER_IS_BETTER, parse_metric_name
from pipelines.tracking.lookup import CHECKPOINT, DIGEST, REMOVED, connected_client, run_link

LOADS = ("autoencoder/psnr", "encode/images", "encode/images_per_second", "train/loss", "train/images_per_second")
MAIN_METRICS = (*LOADS, "train/mfu")
"""Of the stages that score nothing; of an evaluation the Frechet distance at the largest N."""
SCORE, ERROR = "eval/", "eval_error/"
"""What evaluations name a metric, and its error, after."""
PROTOCOL = "raydit.protocol_id"
MOST = 1000


def list_runs(uri: str, *, experiment: str = "", stage: str = "", limit: int = 20) -> list[dict[str, Any]]:
    """Summaries of the newest runs, newest first.

    experiment: left out, of all. stage: left out, all.
    Raises FileNotFoundError if there is no such experiment, ConnectionError if MLflow does not answer.
    """
    with connected_client(uri) as client:
        names = _experiments(client, uri, experiment)
        query = f"tags.`raydit.stage` = '{stage}'" if stage else ""
        order = ["attributes.start_time DESC"]
        runs = client.search_runs(list(names), query, max_results=limit, order_by=order) if names else []
    return [summary(run, uri, names[run.info.experiment_id]) for run in runs]


def summary(run, uri: str, experiment: str) -> dict[str, Any]:
    """A run in a line: start in milliseconds since 1970, duration in seconds or None while it goes on."""
    ended = run.info.end_time
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "experiment": experiment,
        "stage": run.data.tags.get("raydit.stage", ""),
        "status": run.info.status,
        "start": run.info.start_time,
        "seconds": (ended - run.info.start_time) / 1000 if ended else None,
        "metrics": main_metrics(run.data.metrics),
        "link": run_link(uri, run.info.experiment_id, run.info.run_id),
    }


def main_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The few by which a run is known."""
    chosen = {name: metrics[name] for name in MAIN_METRICS if name in metrics}
    scores = [name.removeprefix(SCORE) for name in metrics if name.startswith(SCORE)]
    return chosen | {f"{SCORE}{name}": metrics[f"{SCORE}{name}"] for name in headline(scores)}


def headline(names: Iterable[str]) -> list[str]:
    """Of metrics' names that of the Frechet distance at the largest N; none where there is none."""
    distances = [name for name in names if _kind(name) == "fd"]
    return sorted(distances, key=lambda name: -parse_metric_name(name).num_samples)[:1]


def show_run(uri: str, name: str) -> dict[str, Any]:
    """Everything of one run: by its id, or by its name or the beginning of its id where that is one run's only.

    Raises FileNotFoundError if there is none, ValueError for several.
    """
    with connected_client(uri) as client:
        run = find_run(client, uri, name)
        experiment = client.get_experiment(run.info.experiment_id).name
        parent = run.data.tags.get("mlflow.parentRunId")
        query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        order = ["attributes.start_time"]
        children = client.search_runs([run.info.experiment_id], query, max_results=MOST, order_by=order)
        outputs = list(run.outputs.model_outputs) if run.outputs else []
        models = [client.get_logged_model(output.model_id) for output in outputs]
        parents = [client.get_run(parent)] if parent else []
    return {
        **summary(run, uri, experiment),
        "description": run.data.tags.get("mlflow.note.content", ""),
        "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "inputs": [
            {"name": read.dataset.name, "digest": read.dataset.digest, "source": read.dataset.source}
            for read in run.inputs.dataset_inputs
        ],
        "models": [model_summary(model) for model in models],
        "parent": [summary(each, uri, experiment) for each in parents],
        "children": [summary(each, uri, experiment) for each in children],
    }


def model_summary(model) -> dict[str, Any]:
    """A checkpoint as MLflow knows it."""
    return {
        "model": model.model_id,
        "name": model.name,
        "checkpoint": model.tags.get(CHECKPOINT, ""),
        "digest": model.tags.get(DIGEST, ""),
        "removed": REMOVED in model.tags,
    }


def find_run(client, uri: str, name: str):
    """An MLflow run by its id, its name, or the beginning of its id. Raises FileNotFoundError or ValueError."""
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(ids, f"attributes.run_name = '{name}'", max_results=2) if "'" not in name else []
    runs = runs or [run for run in client.search_runs(ids, max_results=MOST) if run.info.run_id.startswith(name)]
    if not runs:
        raise FileNotFoundError(f"no run {name} at {uri}: expected an id or a name as `raydit runs list` shows them")
    if len(runs) > 1:
        found = ", ".join(run.info.run_id for run in runs[:3])
        raise ValueError(f"{name} at {uri}: found several runs ({found}), expected one. Give its whole id")
    return client.get_run(runs[0].info.run_id)


def best_checkpoints(uri: str, experiment: str, *, metric: str = "", protocol: str = "") -> dict[str, Any]:
    """Checkpoints of an experiment by a metric, the best first; only of one protocol, as others say nothing.

    metric: without eval/, as fid_50k; left out, the Frechet distance at the largest N. protocol: its id; left out,
    the one by which most checkpoints were scored, of as many the newest.
    Raises FileNotFoundError if there are no scores, ValueError for a metric's name that is none.
    """
    if metric:
        parse_metric_name(metric)
    with connected_client(uri) as client:
        (number,) = _experiments(client, uri, experiment)
        order = ["attributes.start_time DESC"]
        query = "tags.`raydit.stage` = 'evaluate'"
        runs = client.search_runs([number], query, max_results=MOST, order_by=order)
        models = _all_models(client, number)
    scores = [score for model in models for score in _scores(model, {run.info.run_id: run for run in runs}, metric)]
    protocols: dict[str, int] = {}
    for score in sorted(scores, key=lambda score: -score["time"]):
        protocols[score["protocol_id"]] = protocols.get(score["protocol_id"], 0) + 1
    chosen = protocol or max(protocols, key=lambda each: protocols[each], default="")
    if chosen not in protocols:
        wanted = " ".join(filter(None, (metric, chosen and f"by protocol {chosen}"))) or "of a checkpoint"
        found = f"scores by {', '.join(protocols)}" if protocols else "none"
        raise FileNotFoundError(
            f"no score {wanted} in experiment {experiment} at {uri}: found {found}, expected some. Make them: "
            "raydit evaluate CHECKPOINT"
        )
    name = metric or headline(score["metric"] for score in scores if score["protocol_id"] == chosen)[0]
    ranked = [score for score in scores if (score["protocol_id"], score["metric"]) == (chosen, name)]
    sign = -1 if _kind(name) in HIGHER_IS_BETTER else 1
    ranked.sort(key=lambda score: (sign * score["value"], -score["time"]))
    once = {score["digest"]: score for score in reversed(ranked)}  # evaluated again: the same numbers once more
    return {
        "metric": name,
        "protocol_id": chosen,
        "higher_is_better": sign < 0,
        "checkpoints": [score for score in ranked if once[score["digest"]] is score],
        "other_protocols": {each: count for each, count in protocols.items() if each != chosen},
    }


def _scores(model, runs: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """Every value of a metric, or of all Frechet distances, that a checkpoint has, with the protocol of its run."""
    found = []
    for point in model.metrics or []:
        name, run = point.key.removeprefix(SCORE), runs.get(point.run_id)
        is_wanted = name == metric if metric else _kind(name) == "fd"
        if run is None or not point.key.startswith(SCORE) or not is_wanted:
            continue
        found.append(
            {
                **model_summary(model),
                "step": point.step,
                "metric": name,
                "value": point.value,
                "error": run.data.metrics.get(ERROR + name),
                "protocol_id": run.data.tags.get(PROTOCOL, ""),
                "reference": point.dataset_digest,
                "run": point.run_id,
                "time": point.timestamp,
            }
        )
    return found


def _kind(name: str) -> str:
    """Kind of a metric by its name; empty for a name that is no metric's."""
    try:
        return parse_metric_name(name).kind
    except ValueError:
        return ""


def _all_models(client, experiment_id: str) -> list:
    models, token = [], None
    while True:
        page = client.search_logged_models([experiment_id], max_results=100, page_token=token)
        models += page
        token = page.token
        if not token:
            return models


def _experiments(client, uri: str, name: str) -> dict[str, str]:
    """Names of experiments by their ids: of all, or of the named one."""
    if not name:
        return {each.experiment_id: each.name for each in client.search_experiments()}
    found = client.get_experiment_by_name(name)
    if found is None:
        known = ", ".join(sorted(each.name for each in client.search_experiments())) or "none"
        raise FileNotFoundError(
            f"no experiment {name} at {uri}: found {known}; name one of them, or a recipe, or set tracking.uri to the "
            "store that holds it"
        )
    return {found.experiment_id: name}
