"""Which checkpoints are kept."""

import json
import re
import time
from collections.abc import Callable

from cluster import storage
from evaluation.protocol import HIGHER_IS_BETTER, parse_metric_name
from evaluation.report import REPORT_FILE
from pipelines.config.training import TrainConfig

ASK_AGAIN_SECONDS = 60.0


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
    names = storage.list_files(evaluations, recursive=True)
    reports = [match for name in names if (match := re.fullmatch(rf"([^/]+)/step_(\d+)/{REPORT_FILE}", name))]
    files = storage.open_in_order([storage.join(evaluations, report[0]) for report in reports])
    for (protocol, step), file in zip((report.groups() for report in reports), files, strict=True):
        with file:
            value = json.load(file)["metrics"].get(metric)
        if value is not None:
            scores.setdefault(protocol, []).append((sign * value, int(step)))
    most = max(scores, key=lambda protocol: len(scores[protocol]), default=None)
    return min(scores[most])[1] if most else None


class ProtectedCheckpoints:
    """Which checkpoints the aliases of registered models lead to: none of them is ever removed.

    While MLflow does not answer nobody knows, and all are kept; it is not asked again before a minute is over, because
    a question to a server that is away may take half of one.
    """

    def __init__(self, uri: str, say: Callable[[str], None]):
        """uri: of the store, as in a recipe."""
        self._uri, self._say, self._not_before = uri, say, 0.0
        self._told: set[int] = set()

    def filter_removable(self, digests: dict[int, str], *, force_refresh: bool = False) -> dict[int, str]:
        """Return the checkpoints (digests by step) that no alias protects.

        force_refresh: ask the registry even if the last failure was less than a minute ago.
        """
        from pipelines.tracking.lookup import protected_digests

        if not digests or (time.monotonic() < self._not_before and not force_refresh):
            return {}
        try:
            protected = protected_digests(self._uri)
        except Exception as error:  # whatever it is: a checkpoint that is gone does not come back
            self._not_before = time.monotonic() + ASK_AGAIN_SECONDS
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(f"outdated checkpoints stay until it is known what registered models lead to: {reason}")
            return {}
        for step in (step for step, digest in digests.items() if digest in protected and step not in self._told):
            self._say(f"checkpoint of step {step:,} stays: an alias of a registered model leads to it")
            self._told.add(step)
        return {step: digest for step, digest in digests.items() if digest not in protected}
