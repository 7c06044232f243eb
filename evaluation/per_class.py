"""The distance of each class's samples from the class's real images, by the metric that the number of images allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.metrics import frechet_distance, kernel_distance
from evaluation.statistics import FeatureStatistics

Array = np.ndarray

MIN_IMAGES = 10
"""Fewest images of a class, on either side, for a kernel distance."""
_SUBSET_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class ClassDistance:
    """How far the samples of one class are from its real images."""

    name: str
    """Name of the class."""
    num_samples: int
    num_real: int
    """Real images of the class whose features the reference holds."""
    metric: str = ""
    """Kind of the distance: "fd" (Frechet) or "kid" (kernel distance); empty: there is none."""
    value: float | None = None
    """The distance; None: there is none, for `reason`."""
    reason: str = ""


def measure_classes(
    features: Array, labels: Array, real: Array, real_labels: Array, class_names: Sequence[str]
) -> list[ClassDistance]:
    """Return the distance of each class.

    features: (N, D) of samples with labels (N,); real: (M, D) with real_labels (M,), both positions in class_names.
    A class with at least 2 D + 1 images on both sides has a Frechet distance; of fewer images a covariance is mostly
    noise, and the unbiased kernel distance takes its place, in subsets of at most 1,000; of fewer than MIN_IMAGES there
    is none.
    """
    return [
        _measure(name, features[labels == label], real[real_labels == label]) for label, name in enumerate(class_names)
    ]


def _measure(name: str, samples: Array, real: Array) -> ClassDistance:
    counts: dict[str, Any] = {"name": name, "num_samples": len(samples), "num_real": len(real)}
    fewest = min(len(samples), len(real))
    if fewest < MIN_IMAGES:
        lacks_samples = len(samples) < MIN_IMAGES
        few = f"{len(samples)} samples" if lacks_samples else f"{len(real)} real images with features"
        return ClassDistance(**counts, reason=f"{few}, and at least {MIN_IMAGES} are needed")
    if fewest > 2 * samples.shape[1]:
        one, other = (_statistics(side) for side in (samples, real))
        return ClassDistance(**counts, metric="fd", value=frechet_distance(one.mean, one.cov, other.mean, other.cov))
    size = min(fewest, _SUBSET_SIZE)
    value, _ = kernel_distance(samples, real, subset_size=size)
    return ClassDistance(**counts, metric="kid", value=value)


def _statistics(features: Array) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics
