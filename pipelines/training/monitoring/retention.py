"""Which checkpoints a training keeps: the newest, multiples of a step, the best one, and those of registered models."""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from cluster import storage
from evaluation.features.extractor_names import extractor_kind
from evaluation.finite_numbers import refuse_nonfinite
from evaluation.metric_names import MEAN_RATIO, RATIO, is_of_extractor, parse_metric_name
from evaluation.ratios import mean_ratio_id, same_held_out
from evaluation.report import REPORT_FILE
from pipelines.config.evaluate import EvaluateConfig, FurtherMetric
from pipelines.config.training import VALIDATION, TrainConfig
from pipelines.console import first_line
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from pipelines.checkpoints.folder import CheckpointFolder

RETRY_SECONDS = 60.0
"""Seconds before MLflow is asked again after it did not answer, because asking an absent server may take half a
minute."""


class Retention:
    """Removes the checkpoints of a training that its recipe does not keep."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: "CheckpointFolder",
        evaluations: str,
        protected: "ProtectedCheckpoints",
        *,
        guide_step: int | None = None,
    ):
        """evaluations: path or URI of the output's evaluations, by which the best checkpoint is chosen.

        guide_step: step of the checkpoint of this training that guides its samples, which is kept; None: there is none.
        """
        self._config, self._checkpoints = config, checkpoints
        self._evaluations, self._protected, self._guide_step = evaluations, protected, guide_step
        self._validations: dict[int, dict[str, float]] = {}
        self._digests: dict[int, str] = {}

    def remove_outdated(self, steps: list[int], in_use: set[int], *, force_refresh: bool = False) -> Iterator[str]:
        """Remove the outdated ones of some steps' checkpoints, and yield the digest of each that is gone.

        steps: all finished steps that may be removed. in_use: steps to keep for now. force_refresh: as in
        ProtectedCheckpoints.filter_removable.
        """
        config = self._config
        best = self._best_step(steps) if config.keep_best else None
        kept = {*in_use, self._guide_step}
        digests = self._digests_of([step for step in outdated_steps(steps, config, best) if step not in kept])
        for step, digest in self._protected.filter_removable(digests, force_refresh=force_refresh).items():
            self._checkpoints.remove(step)
            yield digest

    def _digests_of(self, steps: list[int]) -> dict[int, str]:
        """Return the digests of the checkpoints at some steps, each of which is read once."""
        for step in steps:
            if step not in self._digests:
                self._digests[step] = self._checkpoints.describe(step).digest
        return {step: self._digests[step] for step in steps}

    def _best_step(self, steps: list[int]) -> int | None:
        """Return the step of the best checkpoint at `steps` by train.keep_best; None if none has a value."""
        metric = self._config.keep_best or ""
        if not metric.startswith(VALIDATION):
            return best_step(self._evaluations, metric, self._digests_of(steps))
        from pipelines.training.cursor import DataCursor  # imports torch, which a plan does without

        for step in steps:
            if step not in self._validations:
                cursor = DataCursor.of(self._checkpoints.describe(step))
                self._validations[step] = cursor.validation_at(step)
        name = metric.removeprefix(VALIDATION)
        losses = {step: found[name] for step in steps if name in (found := self._validations[step])}
        return min(losses, key=lambda step: (losses[step], step), default=None)


def check_keep_best(metric: str) -> None:
    """Raise InvalidInput if train.keep_best names neither a metric of evaluations nor a validation loss."""
    if metric.startswith(VALIDATION):
        if not re.fullmatch(rf"{VALIDATION}(raw_)?loss(_quartile_[1-4])?", metric):
            raise InvalidInput(
                f"train.keep_best: found {metric!r}",
                f"{VALIDATION}loss, {VALIDATION}raw_loss, or the quartiles of either, such as "
                f"{VALIDATION}loss_quartile_1",
                "change train.keep_best",
            )
    else:
        parse_metric_name(metric)


def explain_retention(config: TrainConfig, evaluate: EvaluateConfig) -> list[str]:
    """Return in words which checkpoints a training will not keep although its recipe may seem to say so."""
    lines, every, interval = [], config.keep_every, config.checkpoint_every
    if every and every % interval and interval % every:
        lines.append(
            f"train.keep_every = {every:,} keeps a checkpoint every {math.lcm(every, interval):,} steps, because "
            f"train.checkpoint_every = {interval:,}; choose a multiple of that to keep more"
        )
    metric = config.keep_best
    if metric and not metric.startswith(VALIDATION) and not _is_reported(metric, evaluate):
        lines.append(
            f"train.keep_best = {metric!r} is not a metric of this recipe's evaluations, with evaluate.num_samples = "
            f"{evaluate.num_samples:,} and {', '.join(evaluate.extractors or (evaluate.extractor,))}: it keeps a "
            "checkpoint only if other evaluations report it"
        )
    return lines


def _is_reported(metric: str, evaluate: EvaluateConfig) -> bool:
    """Return whether evaluations with these settings may report a metric: with enough images, as far as is known."""
    parts, extractors = parse_metric_name(metric), evaluate.extractors or (evaluate.extractor,)
    kind = parts.kind.name.removeprefix(RATIO)
    if kind in get_args(FurtherMetric) and kind not in evaluate.metrics:
        return False
    # A ratio is measured on as many samples as there are held-out images.
    found, asked = evaluate.num_samples, parts.num_samples
    if asked > found or (asked < found and not parts.kind.is_ratio):
        return False
    if parts.kind == MEAN_RATIO:
        return len(extractors) > 1
    # Names carry the digest of weights that are not published ones, which is not known before they are read.
    if evaluate.extractor_weights is not None or "transformers" in map(extractor_kind, extractors):
        return True
    return any(is_of_extractor(metric, name) for name in extractors)


def outdated_steps(steps: list[int], config: TrainConfig, best: int | None) -> list[int]:
    """Return those steps of finished checkpoints that are not kept, ascending; never the newest or the best one."""
    if config.keep_last is None:
        return []
    kept = {*sorted(steps)[-config.keep_last :], best}
    every = config.keep_every
    return [step for step in sorted(steps) if step not in kept and not (every and step % every == 0)]


def best_step(evaluations: str, metric: str, digests: Mapping[int, str]) -> int | None:
    """Return the step of the checkpoint that is best by a metric, over the reports in output/evaluations.

    digests: of the checkpoints to choose from, by step. The folder also holds reports of others: of checkpoints that
    were removed, and of a superseded training. A report that records no digest is taken for one of its step.

    The protocol of a metric is that of its extractor. Only reports of one protocol are compared, the one by which most
    checkpoints were scored, because numbers of several protocols are not comparable; and of ratios only those to the
    same held-out images. Returns None without a report. Raises InvalidInput if there is no such metric.
    """
    kind = parse_metric_name(metric).kind
    sign = -1 if kind.higher_is_better else 1
    scores: dict[str, dict[int, tuple[float, str]]] = {}
    names = storage.list_files(evaluations, recursive=True)
    matches = [match for name in names if (match := re.fullmatch(rf"([^/]+)/step_(\d+)/{REPORT_FILE}", name))]
    reports = [(match[0], match[1], int(match[2])) for match in matches if int(match[2]) in digests]
    files = storage.open_in_order([storage.join(evaluations, name) for name, _, _ in reports])
    for (name, protocol, step), file in zip(reports, files, strict=True):
        with file:
            report = json.load(file)
        refuse_nonfinite(report, storage.join(evaluations, name))
        value = report["metrics"].get(metric)
        is_current = (report.get("checkpoint_digest") or digests[step]) == digests[step]
        if is_current and value is not None and not report.get("disqualified"):
            own = _protocol_id(report, metric, protocol)
            held_out = report.get("held_out_digest", "") if kind.is_ratio else ""
            scores.setdefault(own, {})[step] = (sign * value, held_out)
    most_used = max(scores, key=lambda protocol: len(scores[protocol]), default=None)
    if most_used is None:
        return None
    found = scores[most_used]
    comparable = same_held_out(held_out for _, held_out in found.values())
    return min((value, step) for step, (value, held_out) in found.items() if held_out in comparable)[1]


def _protocol_id(report: dict[str, Any], metric: str, first: str) -> str:
    """Return EvaluationReport.protocol_id_for(metric) from the content of a report's file.

    first: the id of the first protocol, which a report by one extractor has for all metrics.
    """
    by_extractor, averaged = report.get("protocols", {}), report.get("averaged", {})
    if metric in averaged:
        return mean_ratio_id(by_extractor[each] for each in averaged[metric])
    return next((by_extractor[each] for each in by_extractor if is_of_extractor(metric, each)), first)


class ProtectedCheckpoints:
    """The checkpoints that aliases of registered models point to or that adapters change; none may be removed.

    While MLflow does not answer, all checkpoints are protected.
    """

    def __init__(self, uri: str, say: Callable[[str], None]):
        """uri: of the tracking store, as in a recipe. say: shows a line to the user."""
        self._uri, self._say = uri, say
        self._next_attempt = 0.0
        self._announced: set[int] = set()

    def filter_removable(self, digests: dict[int, str], *, force_refresh: bool = False) -> dict[int, str]:
        """Return the checkpoints (digests by step) that neither an alias nor an adapter protects.

        force_refresh: ask the registry even if the last failure was less than a minute ago.
        """
        from pipelines.tracking.bases import base_digests
        from pipelines.tracking.lookup import protected_digests

        if not digests or (time.monotonic() < self._next_attempt and not force_refresh):
            return {}
        try:
            protected = dict.fromkeys(base_digests(self._uri), "it is the base of an adapter")
            protected |= dict.fromkeys(protected_digests(self._uri), "an alias of a registered model points to it")
        except Exception as error:  # any error: a removed checkpoint cannot be restored
            self._next_attempt = time.monotonic() + RETRY_SECONDS
            self._say(
                f"keeping outdated checkpoints, because it is unknown which ones registered models use: "
                f"{first_line(error)}"
            )
            return {}
        for step, digest in digests.items():
            if digest in protected and step not in self._announced:
                self._say(f"keeping the checkpoint of step {step:,}: {protected[digest]}")
                self._announced.add(step)
        return {step: digest for step, digest in digests.items() if digest not in protected}
