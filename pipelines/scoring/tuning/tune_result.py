"""The content of tune.json: every candidate of a search, and what was measured of it on each rung."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from evaluation.halving import Rung
from evaluation.metric_names import metric_name
from evaluation.plots.tuning import TunedPoint
from pipelines.config.tune import TuneGrid
from pipelines.scoring.tuning.candidates import Candidate
from pipelines.scoring.tuning.measure_candidates import Measurer

SETTINGS = tuple(each.name for each in fields(TuneGrid))
"""Fields of [evaluate] that candidates differ in."""


def describe_result(
    candidates: Sequence[Candidate], rungs: Sequence[Rung], measurer: Measurer, identity: dict[str, Any], budget: float
) -> dict[str, Any]:
    """Return the content of tune.json."""
    best, last = rungs[-1].kept[0], rungs[-1]
    protocol = candidates[best].protocol
    entries = [
        {
            "checkpoint": candidate.opened.origin,
            "checkpoint_digest": candidate.opened.digest,
            **varied_settings(candidate),
            "cost": candidate.cost,
            "protocol_id": candidate.protocol.protocol_id,
            "rungs": [describe_measurement(rung, position, measurer) for rung in rungs if position in rung.measured],
        }
        for position, candidate in enumerate(candidates)
    ]
    return {
        "format": "raydit.tune",
        "version": 1,
        "metric": metric_name("fd", protocol.extractor, protocol.num_samples),
        "seed": protocol.seed,
        "identity": identity,
        "budget": budget,
        "spent": last.spent,
        "num_samples": last.num_samples,
        "best": best,
        "candidates": entries,
    }


def varied_settings(candidate: Candidate) -> dict[str, Any]:
    """Return the settings of a candidate that a grid may vary, as JSON values."""
    values = {name: getattr(candidate.config.evaluate, name) for name in SETTINGS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def describe_measurement(rung: Rung, position: int, measurer: Measurer) -> dict[str, Any]:
    """Return what tune.json says of a candidate on one rung."""
    measured = rung.measured[position]
    found = measurer.measurements[position, rung.num_samples]
    return {
        "num_samples": rung.num_samples,
        "distance": measured.value,
        "error": measured.error,
        "predicted": rung.predicted[position],
        "ratio": found.ratio,
        "recall": found.recall,
        "kept": position in rung.kept,
    }


def tuned_point(entry: dict[str, Any], is_best: bool) -> TunedPoint:
    """Return what the picture shows of a candidate: its last rung."""
    last = entry["rungs"][-1]
    return TunedPoint(
        cost=entry["cost"],
        distance=last["predicted"],
        ratio=last["ratio"],
        recall=last["recall"],
        num_samples=last["num_samples"],
        is_best=is_best,
    )
