"""From features of generated (or held-out real) images and a reference to named numbers, with their errors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from evaluation.metric_names import metric_name
from evaluation.metrics import frechet_distance_to, inception_score, kernel_distance, manifold_scores
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics, InceptionScoreSums
from evaluation.uncertainty import BLOCKS, at_infinity, block_statistics, curve, jackknife_error, merged

Array = np.ndarray

_KID_SUBSET_SIZE = 1000
_NEIGHBOURS = 3
_NEIGHBOURS_DENSITY = 5
_FEWEST = 10
"""Images that the Inception Score's splits and the neighbours need."""
_FEWEST_POINTS = 5
"""Sizes through which a line over 1 / N is drawn at least."""


@dataclass(frozen=True)
class Score:
    """Metrics under their contract names, with the spread of those that have one."""

    metrics: dict[str, float]
    errors: dict[str, float]
    """Standard error (fd, sfd, fd_infinity) or standard deviation over splits (is) or subsets (kid), by name."""
    warnings: list[str]
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Frechet distance of the first N of the samples in random order, from twice the feature dimension on."""


def score(
    features: Array,
    logits: Array | InceptionScoreSums | None,
    reference: ReferenceStatistics,
    *,
    extractor: str,
    num_samples: int,
    spatial: Array | None = None,
    errors: bool = True,
) -> Score:
    """Score exactly num_samples images by their features (N, D), logits (N, K) and, for sFID, spatial (N, 2023).

    logits: or the sums made of them while they passed by, or None from an extractor without. extractor: its name,
    which goes into the metrics' names; it must be the reference's. errors: False leaves out standard errors and
    Frechet distance at infinite N, which cost up to nineteen Frechet distances.
    Generated images and held-out real ones are scored alike: the latter give the real baseline, the best score
    that N images can get. What the reference cannot give is left out: kernel distance and the manifold scores need its
    features, sFID its mu_s and sigma_s. Raises ValueError if anything is not of num_samples images.
    """
    if extractor != reference.extractor:
        raise ValueError(
            f"Found a reference of extractor {reference.extractor!r}, expected {extractor!r}. "
            "Build one with `raydit reference build`, or change evaluate.extractor."
        )
    _check_counts(num_samples, features=features, logits=logits, spatial=spatial)
    parts = BLOCKS if errors and num_samples >= 2 * BLOCKS else 1
    measure, blocks = _distance_to(reference.mu, reference.sigma), block_statistics(features, parts)
    found = {"fd": _estimate(blocks, measure)}
    points, smallest = [], 2 * len(reference.mu)
    if parts > 1 and num_samples >= smallest:
        points = [*curve(blocks[:-1], measure, smallest), (num_samples, found["fd"].value)]
    if len(points) >= _FEWEST_POINTS:
        line = at_infinity(points, found["fd"].error or 0.0)
        found["fd_infinity"] = Estimate(line.value, line.error)
    if spatial is not None and reference.mu_s is not None and reference.sigma_s is not None:
        found["sfd"] = _estimate(block_statistics(spatial, parts), _distance_to(reference.mu_s, reference.sigma_s))
    if num_samples >= _FEWEST:
        if logits is not None:
            scores = logits.score() if isinstance(logits, InceptionScoreSums) else inception_score(logits)
            found["is"] = Estimate(*scores)
        if reference.features is not None:
            found |= _among_real(features, reference.features)
    names = {kind: metric_name(kind, extractor, num_samples) for kind in found}
    return Score(
        metrics={names[kind]: estimate.value for kind, estimate in found.items()},
        errors={names[kind]: estimate.error for kind, estimate in found.items() if estimate.error is not None},
        warnings=_warnings(num_samples, reference),
        curve=points,
    )


class Estimate(NamedTuple):
    """A metric, and how sure it is where that is known."""

    value: float
    error: float | None = None


def _check_counts(num_samples: int, **given: Array | InceptionScoreSums | None) -> None:
    """Padding, or a shard that is missing, must not pass."""
    for what, values in given.items():
        if values is not None and len(values) != num_samples:
            raise ValueError(
                f"Found {what} of {len(values)} images, expected exactly {num_samples}. Score every sample once, and "
                "no padding."
            )


def _distance_to(mu: Array, sigma: Array) -> Callable[[FeatureStatistics], float]:
    distance = frechet_distance_to(mu, sigma)
    return lambda statistics: distance(statistics.mean, statistics.cov)


def _estimate(blocks: list[FeatureStatistics], measure: Callable[[FeatureStatistics], float]) -> Estimate:
    error = jackknife_error(blocks, measure) if len(blocks) > 1 else None
    return Estimate(measure(merged(blocks)), error)


def _among_real(features: Array, real: Array) -> dict[str, Estimate]:
    """Metrics that compare sample with sample."""
    size = min(_KID_SUBSET_SIZE, len(features), len(real))
    scores = manifold_scores(features, real, _NEIGHBOURS, _NEIGHBOURS_DENSITY)._asdict()
    kid = Estimate(*kernel_distance(features, real, subset_size=size))
    return {"kid": kid} | {kind: Estimate(value) for kind, value in scores.items()}


def _warnings(n: int, reference: ReferenceStatistics) -> list[str]:
    """Below 2 D images a covariance is mostly noise, and Frechet distance mostly bias.

    reference.n of 0 is unknown, and not judged.
    """
    dim = len(reference.mu)
    counts = {"images": n, "reference images": reference.n or 2 * dim}
    warnings = [
        f"{count} {what} are fewer than twice the {dim} feature dimensions: Frechet distance is mostly bias. "
        f"Compare it only with scores of as many images, or use at least {2 * dim}."
        for what, count in counts.items()
        if count < 2 * dim
    ]
    if n < _FEWEST:
        warnings.append(f"{n} images are too few for anything but Frechet distance: use at least {_FEWEST}.")
    elif reference.features is not None and min(n, len(reference.features)) < _KID_SUBSET_SIZE:
        kept = len(reference.features)
        warnings.append(
            f"kid uses subsets of {min(n, kept)} instead of {_KID_SUBSET_SIZE}, the smaller of {n} images and "
            f"{kept} reference features: its spread is not comparable with published ones."
        )
    return warnings
