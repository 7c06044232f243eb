"""Scores of checkpoints by protocols that differ in their seed alone: their mean, and which protocol was the first."""

import math
from collections.abc import Collection, Hashable, Iterable
from statistics import fmean, stdev
from typing import Any, NamedTuple

PARAMS = "protocol."
"""Prefix of the params with a protocol's fields, which the run of an evaluation has."""


class SeededProtocol(NamedTuple):
    """What a protocol says but for its seed, and the seed."""

    rest: Hashable
    seed: int


def find_seeds(scores: Iterable[dict[str, Any]], runs: dict[str, Any]) -> dict[str, SeededProtocol]:
    """Return the seeds of the protocols of scores, by the protocols' ids; without those that no run tells.

    scores: as best_checkpoints ranks them. runs: those that they are of, by id.
    """
    found = {}
    for score in scores:
        params = runs[score["run"]].data.params
        fields = {name: value for name, value in params.items() if name.startswith(PARAMS)}
        seed = fields.pop(f"{PARAMS}seed", "")
        if seed.isdecimal():
            extractor = score["protocol"].rpartition(", ")[2]  # or those that a mean ratio is over
            rest = (frozenset(fields.items()), extractor, score["reference"], score["held_out"])
            found[score["protocol_id"]] = SeededProtocol(rest, int(seed))
    return found


def first_of_seeds(protocol_id: str, among: Collection[str], seeds: dict[str, SeededProtocol]) -> str:
    """Return the protocol from whose seed the seeds of others are counted up to that of one protocol.

    among: ids of the protocols that may be taken.
    """
    ids = {seeds[each]: each for each in among if each in seeds}
    while (own := seeds.get(protocol_id)) and (before := ids.get(own._replace(seed=own.seed - 1))):
        protocol_id = before
    return protocol_id


def average_repeats(
    ranked: Iterable[dict[str, Any]], scores: Iterable[dict[str, Any]], seeds: dict[str, SeededProtocol]
) -> list[dict[str, Any]]:
    """Return scores with the mean over their own and the following seeds as value, and its standard error.

    Only scores of a checkpoint's first seed are averaged, as in reports. `seeds` of a score is the number of its seeds.
    scores: those of all protocols.
    """
    values: dict[Hashable, dict[int, float]] = {}
    for score in sorted(scores, key=lambda score: score["time"]):  # of scores by one protocol the newest counts
        if own := seeds.get(score["protocol_id"]):
            values.setdefault((score["digest"], score["metric"], own.rest), {})[own.seed] = score["value"]
    averaged = []
    for score in ranked:
        repeats = [score["value"]]
        if own := seeds.get(score["protocol_id"]):
            by_seed = values[score["digest"], score["metric"], own.rest]
            if own.seed - 1 not in by_seed:
                end = own.seed + 1
                while end in by_seed:
                    end += 1
                repeats = [by_seed[seed] for seed in range(own.seed, end)]
        if len(repeats) > 1:
            error = stdev(repeats) / math.sqrt(len(repeats))
            score = {**score, "value": fmean(repeats), "error": error}
        averaged.append({**score, "seeds": len(repeats)})
    return averaged
