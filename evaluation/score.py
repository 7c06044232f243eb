"""From features of generated (or held-out real) images and a reference to named numbers."""

from dataclasses import dataclass

import numpy as np

from evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from evaluation.protocol import metric_name
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics

Array = np.ndarray

_KID_SUBSET_SIZE = 1000
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Score:
    """Metrics under their contract names, with the spread of those that have one."""

    metrics: dict[str, float]
    errors: dict[str, float]
    """Standard deviation over splits (IS) or subsets (KID), under the metric's name."""
    warnings: list[str]


def score(
    features: Array,
    logits: Array,
    reference: ReferenceStatistics,
    *,
    extractor: str,
    spatial: Array | None = None,
) -> Score:
    """Score N images by their features (N, D), logits (N, K) and, for sFID, spatial features (N, 2023).

    extractor: its name, which goes into the metrics' names; it must be the reference's.
    Generated images and held-out real ones are scored alike: the latter give the floor, the best score that
    N images can get. Kernel distance, precision and recall need a reference with features, sFID one with
    mu_s and sigma_s; without, they are left out.
    """
    if extractor != reference.extractor:
        raise ValueError(
            f"Found a reference of extractor {reference.extractor!r}, expected {extractor!r}. "
            "Build one with `raydit reference build`, or change evaluate.extractor."
        )
    n, dim = len(features), len(reference.mu)
    metrics = {"fd": _frechet(features, reference.mu, reference.sigma)}
    errors: dict[str, float] = {}
    warnings = _small_sample_warnings(n, reference.n, dim)
    if spatial is not None and reference.mu_s is not None and reference.sigma_s is not None:
        metrics["sfd"] = _frechet(spatial, reference.mu_s, reference.sigma_s)
    metrics["is"], errors["is"] = inception_score(logits)
    if reference.features is not None:
        real = reference.features
        size = min(_KID_SUBSET_SIZE, n, len(real))
        metrics["kid"], errors["kid"] = kernel_distance(features, real, subset_size=size)
        if size < _KID_SUBSET_SIZE:
            warnings.append(
                f"kid uses subsets of {size} instead of {_KID_SUBSET_SIZE}, the smaller of {n} images and "
                f"{len(real)} reference features: its spread is not comparable with published ones."
            )
        metrics["precision"], metrics["recall"] = precision_recall(features, real, k=_NEIGHBOURS)
    return Score(_named(metrics, extractor, n), _named(errors, extractor, n), warnings)


def _frechet(features: Array, mu: Array, sigma: Array) -> float:
    statistics = FeatureStatistics(len(mu))
    statistics.update(features)
    return frechet_distance(statistics.mean, statistics.cov, mu, sigma)


def _small_sample_warnings(n: int, reference_n: int, dim: int) -> list[str]:
    """Below 2 D images a covariance is mostly noise, and Frechet distance mostly bias.

    reference_n of 0 is unknown, and not judged.
    """
    counts = {"images": n, "reference images": reference_n or 2 * dim}
    return [
        f"{count} {what} are fewer than twice the {dim} feature dimensions: Frechet distance is mostly bias. "
        f"Compare it only with scores of as many images, or use at least {2 * dim}."
        for what, count in counts.items()
        if count < 2 * dim
    ]


def _named(values: dict[str, float], extractor: str, n: int) -> dict[str, float]:
    return {metric_name(kind, extractor, n): value for kind, value in values.items()}
