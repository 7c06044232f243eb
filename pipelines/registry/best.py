"""Rank the checkpoints of an experiment by their scores."""

from collections.abc import Iterable, Sequence
from typing import Any

from evaluation.metric_names import MEAN_RATIO, parse_metric_name
from evaluation.ratios import same_held_out
from pipelines.registry.queries import (
    experiments_by_id,
    find_extractor,
    headline_metrics,
    metric_kind,
    model_summary,
    protocol_ids,
    protocol_summary,
    source_commits,
)
from pipelines.registry.repeats import SeededProtocol, average_repeats, find_seeds, first_of_seeds
from pipelines.scoring.reports.log_report import REFERENCE
from pipelines.tracking import tags
from pipelines.tracking.lookup import connected_client
from pipelines.tracking.run_log import SCORE
from pipelines.tracking.searches import all_pages, search_runs
from raydit.errors import NotFound

ERROR = "eval_error/"
"""Prefix of the errors of an evaluation's metrics."""


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
    scores, runs = find_scores(uri, experiment, metric)
    seeds = find_seeds(scores, runs)
    counts = count_checkpoints(scores, runs)
    summaries = {score["protocol_id"]: score["protocol"] for score in scores}
    chosen = protocol or most_used_protocol(counts, seeds)
    if chosen not in counts:
        wanted = " ".join(filter(None, (metric, chosen and f"by protocol {chosen}"))) or "of a checkpoint"
        found = f"scores by {', '.join(f'{each} ({summaries[each]})' for each in counts)}" if counts else "none"
        raise NotFound(
            f"no score {wanted} in experiment {experiment} at {uri}: found {found}",
            "at least one",
            "score a checkpoint: raydit evaluate CHECKPOINT",
        )
    name = metric or headline_metrics(score["metric"] for score in scores if score["protocol_id"] == chosen)[0]
    comparable = [score for score in scores if (score["protocol_id"], score["metric"]) == (chosen, name)]
    if parse_metric_name(name).kind.is_ratio:
        held_out = same_held_out(score["held_out"] for score in comparable)
        comparable = [score for score in comparable if score["held_out"] in held_out]
    higher_is_better = parse_metric_name(name).kind.higher_is_better
    return {
        "metric": name,
        "protocol_id": chosen,
        "protocol": summaries[chosen],
        "higher_is_better": higher_is_better,
        "checkpoints": rank(average_repeats(comparable, scores, seeds), higher_is_better=higher_is_better),
        "other_protocols": {each: count for each, count in counts.items() if each != chosen},
        "protocols": summaries,
    }


def find_scores(uri: str, experiment: str, metric: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the scores of all checkpoints of an experiment, and the runs that they are of by id.

    metric: empty for all Frechet distances.
    """
    with connected_client(uri) as client:
        (number,) = experiments_by_id(client, uri, experiment)
        query = tags.has(tags.STAGE, "evaluate")
        runs = {run.info.run_id: run for run in search_runs(client, [number], query, "attributes.start_time DESC")}
        models = list(all_pages(lambda token: client.search_logged_models([number], max_results=100, page_token=token)))
        commits = source_commits(client, models)
    scores = [
        {**score, "commit": commits[model.source_run_id]} for model in models for score in _scores(model, runs, metric)
    ]
    return scores, runs


def count_checkpoints(scores: Iterable[dict[str, Any]], runs: dict[str, Any]) -> dict[str, int]:
    """Return how many checkpoints each protocol scored: the newest protocol first, and of one evaluation its first
    extractor's."""
    scored: dict[str, set[str]] = {}  # a checkpoint that was scored several times by one protocol counts as one
    for score in sorted(scores, key=lambda score: (-score["time"], _is_further(score, runs))):
        scored.setdefault(score["protocol_id"], set()).add(score["digest"])
    return {protocol_id: len(digests) for protocol_id, digests in scored.items()}


def most_used_protocol(counts: dict[str, int], seeds: dict[str, SeededProtocol]) -> str:
    """Return the protocol that scored most checkpoints, of several such the newest; empty if there is none.

    counts: see count_checkpoints. Protocols that differ in the seed are repeats, of which the first is returned.
    """
    most = max(counts.values(), default=0)
    newest = [protocol_id for protocol_id, count in counts.items() if count == most]
    return first_of_seeds(newest[0], newest, seeds) if newest else ""


def rank(scores: Sequence[dict[str, Any]], *, higher_is_better: bool) -> list[dict[str, Any]]:
    """Return the scores of one metric, the best first and equal ones newest first, one of each checkpoint."""
    sign = -1 if higher_is_better else 1
    ranked = sorted(scores, key=lambda score: (sign * score["value"], -score["time"]))
    once = {score["digest"]: score for score in reversed(ranked)}  # a repeated evaluation adds the same numbers again
    return [score for score in ranked if once[score["digest"]] is score]


def _scores(model: Any, runs: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """Return every value of a metric that a checkpoint has, with the protocol of its run.

    Evaluations that found it defective are left out. metric: empty for all Frechet distances.
    """
    found = []
    for point in model.metrics or []:
        name, run = point.key.removeprefix(SCORE), runs.get(point.run_id)
        is_wanted = name == metric if metric else metric_kind(name) == "fd"
        if run is None or tags.DISQUALIFIED in run.data.tags or not point.key.startswith(SCORE) or not is_wanted:
            continue
        extractor = find_extractor(run, name)
        main = run.data.tags.get(tags.PROTOCOL_ID, "")
        protocol_id, said = protocol_ids(run).get(extractor, main), protocol_summary(run, extractor)
        if metric_kind(name) == MEAN_RATIO.name:  # of several extractors' protocols, which it was logged with
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
