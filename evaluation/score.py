"""Scoring: from features of generated or held-out real images and a reference to named metrics with errors."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from evaluation.manifold_errors import manifold_estimates
from evaluation.metric_names import metric_name
from evaluation.metrics import (
    ManifoldScores,
    cmmd,
    frechet_distance_to,
    inception_score,
    kernel_distance,
    manifold_scores,
    median_distance,
    mind,
    rbf_mmd,
)
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics, InceptionScoreSums, assign_random_parts
from evaluation.uncertainty import (
    BLOCKS,
    Measure,
    compute_block_statistics,
    extrapolate,
    measure_growing_subsets,
    measure_without_each,
    merge_blocks,
    spread_error,
)
from raydit.errors import InvalidInput

Array = np.ndarray

_KID_SUBSET_SIZE = 1000
_NEIGHBOURS = 3
_NEIGHBOURS_DENSITY = 5
_MIN_IMAGES = 10
"""Number of images that the Inception Score's splits and the nearest neighbours need."""
_MIN_POINTS = 5
"""Number of points that the line over 1 / N needs."""


@dataclass(frozen=True)
class Score:
    """Metrics by their names (see evaluation.metric_names), with errors and warnings."""

    metrics: dict[str, float]
    errors: dict[str, float]
    """Standard error (fd, sfd, fd_infinity, precision, recall, density, coverage), or standard deviation over splits
    (is) or subsets (kid), by name."""
    warnings: list[str]
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(N, Frechet distance) of the first N samples in random order, for N of at least twice the feature dimension."""
    missing: dict[str, str] = field(default_factory=dict)
    """Metrics that so few images do not allow, by their names, with the reason."""
    left_out: dict[str, Array] = field(default_factory=dict)
    """Frechet distances (K,) without each block of images, by their names, from which errors follow."""


def score(
    features: Array,
    logits: Array | InceptionScoreSums | None,
    reference: ReferenceStatistics,
    *,
    extractor: str,
    num_samples: int,
    spatial: Array | None = None,
    errors: bool = True,
    left_out: bool = False,
    further: Collection[str] = (),
) -> Score:
    """Score exactly num_samples images by their features (N, D), logits (N, K) and, for sFID, spatial (N, 2023).

    logits: the logits, or sums to which all of them were added, or None if the extractor has none. extractor: its
    name, which becomes part of the metrics' names; must be the reference's. errors: False leaves out standard errors
    and the Frechet distance at infinite N, which cost up to nineteen Frechet distances. left_out: fills Score.left_out
    nevertheless, at ten Frechet distances. further: more kinds of FURTHER_METRICS.
    Generated images and held-out real ones are scored alike: the latter give the real baseline, the best score
    that N images can get. Metrics that the reference does not allow are left out: kernel distance and the manifold
    scores need its features, sFID its mu_s and sigma_s. Raises InvalidInput if the reference has another extractor,
    ValueError if an argument does not hold num_samples images.
    """
    if extractor != reference.extractor:
        raise InvalidInput(
            f"reference of extractor {reference.extractor!r}",
            repr(extractor),
            "build a reference with `raydit reference build`, or change evaluate.extractor",
        )
    _check_counts(num_samples, features=features, logits=logits, spatial=spatial)
    parts = BLOCKS if (errors or left_out) and num_samples >= 2 * BLOCKS else 1
    measure, blocks = _distance_to(reference.mu, reference.sigma), compute_block_statistics(features, parts)
    found = {"fd": _estimate(blocks, measure)}
    points, smallest = [], 2 * len(reference.mu)
    if errors and parts > 1 and num_samples >= smallest:
        points = [*measure_growing_subsets(blocks[:-1], measure, smallest), (num_samples, found["fd"].value)]
    if len(points) >= _MIN_POINTS:
        line = extrapolate(points, found["fd"].error or 0.0)
        found["fd_infinity"] = Estimate(line.value, line.error)
    del blocks  # as large as the features themselves
    if spatial is not None and reference.mu_s is not None and reference.sigma_s is not None:
        found["sfd"] = _estimate(
            compute_block_statistics(spatial, parts), _distance_to(reference.mu_s, reference.sigma_s)
        )
    if num_samples >= _MIN_IMAGES:
        if logits is not None:
            scores = logits.score() if isinstance(logits, InceptionScoreSums) else inception_score(logits)
            found["is"] = Estimate(*scores)
        if reference.features is not None:
            found |= _compare_samples(features, reference.features, parts if errors else 1)
    missing = _explain_further(further, num_samples, reference.features)
    if reference.features is not None:
        for kind in further:
            if kind not in missing:
                found[kind] = Estimate(FURTHER_METRICS[kind](features, reference.features))
    without_each = {kind: estimate.left_out for kind, estimate in found.items() if estimate.left_out is not None}
    if not errors:
        found |= {kind: Estimate(found[kind].value) for kind in without_each}
    if reference.features is not None:
        missing = explain_missing(num_samples, len(reference.features)) | missing
    names = {kind: metric_name(kind, extractor, num_samples) for kind in (*found, *missing)}
    return Score(
        metrics={names[kind]: estimate.value for kind, estimate in found.items()},
        errors={names[kind]: estimate.error for kind, estimate in found.items() if estimate.error is not None},
        warnings=[*summarize_missing(missing), *_warnings(num_samples, reference)],
        curve=points,
        missing={names[kind]: reason for kind, reason in missing.items()},
        left_out={names[kind]: values for kind, values in without_each.items()},
    )


def explain_missing(num_samples: int, num_real: int) -> dict[str, str]:
    """Return the metrics that compare single images and that cannot be computed, with the reason for each.

    num_real: real images with features. Fewer than 10 samples have none of these metrics in the first place, which
    their warning says.
    """
    if num_samples < _MIN_IMAGES:
        return {}
    needed = {"kid": 1, **dict.fromkeys(ManifoldScores._fields, max(_NEIGHBOURS, _NEIGHBOURS_DENSITY))}
    return {
        kind: f"{num_real} real images, and more than {most} are needed"
        for kind, most in needed.items()
        if num_real <= most
    }


def summarize_missing(missing: Mapping[str, str]) -> list[str]:
    """Return a sentence for every reason in the result of explain_missing, with the metrics that share it."""
    kinds: dict[str, list[str]] = {}
    for kind, reason in missing.items():
        kinds.setdefault(reason, []).append(kind)
    return [f"{', '.join(names)} cannot be computed: there are {reason}." for reason, names in kinds.items()]


class Estimate(NamedTuple):
    """A metric, and its error if known."""

    value: float
    error: float | None = None
    left_out: Array | None = None
    """(K,): the metric without each block of images, where the error follows from it."""


def _check_counts(num_samples: int, **given: Array | InceptionScoreSums | None) -> None:
    """Refuse padding and missing shards."""
    for what, values in given.items():
        if values is not None and len(values) != num_samples:
            raise ValueError(
                f"Found {what} of {len(values)} images, expected exactly {num_samples}. Score every sample once, and "
                "no padding."
            )


def _distance_to(mu: Array, sigma: Array) -> Measure:
    """Return the function from statistics to their Frechet distance from a reference."""
    distance = frechet_distance_to(mu, sigma)
    return lambda statistics: distance(statistics.mean, statistics.cov)


def _estimate(blocks: list[FeatureStatistics], measure: Measure) -> Estimate:
    """Measure all blocks together, with the jackknife error if there are several."""
    value = measure(merge_blocks(blocks))
    if len(blocks) == 1:
        return Estimate(value)
    left_out = measure_without_each(blocks, measure)
    return Estimate(value, spread_error(left_out), left_out)


def _compare_samples(features: Array, real: Array, parts: int) -> dict[str, Estimate]:
    """Return the metrics that compare single generated with single real samples, but for those of explain_missing.

    parts: blocks of samples that the errors of precision, recall, density and coverage follow from; 1: no errors.
    """
    size, missing = min(_KID_SUBSET_SIZE, len(features), len(real)), explain_missing(len(features), len(real))
    found = {} if "kid" in missing else {"kid": Estimate(*kernel_distance(features, real, subset_size=size))}
    if not missing.keys() & set(ManifoldScores._fields):
        neighbours = (_NEIGHBOURS, _NEIGHBOURS_DENSITY)
        if parts == 1:
            scores = manifold_scores(features, real, *neighbours)._asdict()
            return found | {kind: Estimate(value) for kind, value in scores.items()}
        block_of = assign_random_parts(len(features), parts)
        estimates = manifold_estimates(features, real, block_of, *neighbours)
        for kind, value in estimates.scores._asdict().items():
            found[kind] = Estimate(value, spread_error(estimates.left_out[kind]))
    return found


def _explain_further(further: Collection[str], num_samples: int, real: Array | None) -> dict[str, str]:
    """Return those of the further metrics that cannot be computed, with the reason for each."""
    if num_samples < _MIN_IMAGES:
        return dict.fromkeys(further, f"{num_samples} samples, and at least {_MIN_IMAGES} are needed")
    if real is None:
        return dict.fromkeys(further, "the reference holds no features of single images")
    missing = {}
    if "rbf_mmd" in further:
        try:
            median_distance(real)
        except InvalidInput as error:
            missing["rbf_mmd"] = f"the reference has {error.found}"
    return missing


def _rbf_mmd(features: Array, real: Array) -> float:
    """Return the squared MMD whose kernel is as wide as the median distance of real images, whatever the samples."""
    return rbf_mmd(features, real, median_distance(real))


FURTHER_METRICS: Mapping[str, Callable[[Array, Array], float]] = {"cmmd": cmmd, "mind": mind, "rbf_mmd": _rbf_mmd}
"""Metrics that are computed where they are asked for, as functions of generated (N, D) and real features (M, D)."""


def _warnings(n: int, reference: ReferenceStatistics) -> list[str]:
    """Warn about too few images: below 2 D a covariance is mostly noise, and Frechet distance mostly bias.

    There is no warning about a reference whose number of images is unknown (reference.n is 0).
    """
    dim = len(reference.mu)
    counts = {"images": n, "reference images": reference.n or 2 * dim}
    warnings = [
        f"{count} {what} are fewer than twice the {dim} feature dimensions: Frechet distance is mostly bias. "
        f"Compare it only with scores of as many images, or use at least {2 * dim}."
        for what, count in counts.items()
        if count < 2 * dim
    ]
    if n < _MIN_IMAGES:
        warnings.append(f"{n} images are too few for anything but Frechet distance: use at least {_MIN_IMAGES}.")
    elif reference.features is not None and min(n, len(reference.features)) < _KID_SUBSET_SIZE:
        kept = len(reference.features)
        warnings.append(
            f"kid uses subsets of {min(n, kept)} instead of {_KID_SUBSET_SIZE}, the smaller of {n} images and "
            f"{kept} reference features: its spread is not comparable with published ones."
        )
    return warnings
