"""Successive halving: find the candidate with the lowest distance without measuring all candidates on all samples.

Every candidate is measured on a few samples, the better ones on more, and so on (Jamieson & Talwalkar 2016, arXiv
1502.07943). Sample i of all candidates has the same label and noise, so that their differences vary less than their
distances (common random numbers), and those that are worse by more than the error of the difference are dropped first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evaluation.uncertainty import spread_error

Array = np.ndarray

FACTOR = 3
"""Factor from one rung's number of samples to the next."""
SEPARATION = 2.0
"""Standard errors of the difference beyond which a candidate is worse than the best."""


class Measured(NamedTuple):
    """A distance that falls as the number of samples grows, on some samples of a candidate."""

    value: float
    left_out: Array
    """(K,): the distance without each block of samples. Block k has the same indices for all candidates."""

    @property
    def error(self) -> float:
        """The jackknife standard error of the distance."""
        return spread_error(self.left_out)

    def predict(self, num_samples: int, target: int) -> float:
        """Return what the distance is expected to be on `target` samples, measured on `num_samples`.

        The bias of a Frechet distance is about b / N. The jackknife removes it: K value - (K - 1) mean(left_out)
        (Quenouille 1956). On the target, num_samples / target of it is left. More diverse samples have more bias, so
        that the distances of few samples would favour candidates with too much guidance.
        """
        blocks = len(self.left_out)
        unbiased = blocks * self.value - (blocks - 1) * float(self.left_out.mean())
        return unbiased + (self.value - unbiased) * num_samples / target


@dataclass(frozen=True)
class Rung:
    """One round of the search."""

    num_samples: int
    """Samples of each candidate."""
    measured: dict[int, Measured]
    """Results by the candidate's position."""
    predicted: dict[int, float]
    """Predicted distance of each candidate on the last rung's samples."""
    kept: tuple[int, ...]
    """The candidates that are measured on the next rung, best first; after the last one, the best alone."""
    spent: float
    """Cost of all rungs up to this one, as a share of that of measuring all candidates on all samples."""


def plan_rungs(num_samples: int, multiple: int, rungs: int = 3) -> list[int]:
    """Return the number of samples of each rung, ascending: num_samples, a third of it, and so on.

    They are multiples of `multiple`, but for the last one, and no two are equal.
    """
    sizes = [num_samples // FACTOR**power for power in reversed(range(rungs))]
    rounded = {max(multiple, size // multiple * multiple) for size in sizes[:-1]}
    return [*sorted(size for size in rounded if size < num_samples), num_samples]


def search(
    costs: Sequence[float],
    sizes: Sequence[int],
    budget: float,
    measure: Callable[[Sequence[int], int], Sequence[Measured]],
    multiple: int = 1,
) -> list[Rung]:
    """Find the candidate with the lowest distance; return the rungs, the last of which keeps it alone.

    costs: of one sample of each candidate. sizes: see plan_rungs. budget: most that is spent, as a share of the cost of
    all samples of all candidates; the first rung measures all candidates, whatever it costs. measure: returns the
    distances of candidates, by their positions, on their first n samples, of which an earlier call may have computed
    some. multiple: what the number of samples of a rung between those planned must be a multiple of.

    Where the budget does not reach to the next rung for two candidates that are not clearly different, these two are
    measured on as many samples as it does reach for.
    """
    total = sum(costs) * sizes[-1]
    kept, spent, before, planned = list(range(len(costs))), 0.0, 0, list(sizes)
    found: list[Rung] = []
    while True:
        size = planned.pop(0)
        spent += sum(costs[candidate] for candidate in kept) * (size - before) / total
        measured = dict(zip(kept, measure(kept, size), strict=True))
        predicted = {candidate: each.predict(size, sizes[-1]) for candidate, each in measured.items()}
        ranked = _not_worse(measured, predicted)
        kept = ranked[:1]
        if len(ranked) > 1 and planned:
            left, share_of_cost = budget - spent, (planned[0] - size) / total
            # What is left is spent evenly on the rungs that are left, or on the next one alone if it is little.
            kept = _affordable(ranked, costs, share_of_cost, left / len(planned))
            if len(kept) == 1:
                kept = _affordable(ranked, costs, share_of_cost, left)
            if len(kept) == 1:
                cost = sum(costs[candidate] for candidate in ranked[:2])
                reached = int(size + left * total / cost) // multiple * multiple
                planned = [reached]
                kept = ranked[:2] if reached > size else kept
        found.append(Rung(size, measured, predicted, tuple(kept), spent))
        if len(kept) == 1:
            return found
        before = size


def _not_worse(measured: dict[int, Measured], predicted: dict[int, float]) -> list[int]:
    """Return the candidates that are not clearly worse than the best one, best first."""
    ranked = sorted(measured, key=lambda candidate: (predicted[candidate], candidate))
    best = ranked[0]
    return [
        each
        for each in ranked
        if predicted[each] - predicted[best] <= SEPARATION * difference_error(measured[each], measured[best])
    ]


def difference_error(one: Measured, other: Measured) -> float:
    """Return the jackknife standard error of the difference of two distances on the same blocks of samples."""
    return spread_error(one.left_out - other.left_out)


def _affordable(ranked: Sequence[int], costs: Sequence[float], share_of_cost: float, share: float) -> list[int]:
    """Return as many of the candidates, from the best on, as cost no more than a share of all; at least the best."""
    kept, spent = [ranked[0]], costs[ranked[0]] * share_of_cost
    for candidate in ranked[1:]:
        spent += costs[candidate] * share_of_cost
        if spent > share:
            break
        kept.append(candidate)
    return kept
