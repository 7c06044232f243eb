"""Which checkpoints are kept."""

import re

from cluster import storage
from evaluation.protocol import HIGHER_IS_BETTER, parse_metric_name
from evaluation.report import REPORT_FILE
from pipelines.config_train import TrainConfig


def outdated_steps(steps: list[int], config: TrainConfig, best: int | None) -> list[int]:
    """Of the steps of finished checkpoints those that are not to be kept; never the newest."""
    if config.keep_last is None:
        return []
    kept = {*sorted(steps)[-config.keep_last :], best}
    every = config.keep_every
    return [step for step in sorted(steps) if step not in kept and not (every and step % every == 0)]


def best_step(evaluations: str, metric: str) -> int | None:
    """Step of the checkpoint that is best by a metric, over the reports in output/evaluations; None without any.

    Compared are those of one protocol, the one by which most checkpoints were scored: others are other numbers.
    Raises ValueError for a name that is no metric's.
    """
    sign = -1 if parse_metric_name(metric).kind in HIGHER_IS_BETTER else 1
    scores: dict[str, list[tuple[float, int]]] = {}
    for name in storage.list_files(evaluations, recursive=True):
        if match := re.fullmatch(rf"([^/]+)/step_(\d+)/{REPORT_FILE}", name):
            value = storage.read_json(storage.join(evaluations, name))["metrics"].get(metric)
            if value is not None:
                scores.setdefault(match[1], []).append((sign * value, int(match[2])))
    most = max(scores, key=lambda protocol: len(scores[protocol]), default=None)
    return min(scores[most])[1] if most else None
