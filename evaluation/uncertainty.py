"""The standard error of a Frechet distance, and its extrapolation to infinite N, from the same blocks of samples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.statistics import FeatureStatistics, assign_random_parts

Array = np.ndarray
Measure = Callable[[FeatureStatistics], float]

BLOCKS = 10
"""Number of blocks of samples: each is left out once for the error, and each adds a point to the curve over N."""


def compute_block_statistics(features: Array, blocks: int = BLOCKS, seed: int = 2020) -> list[FeatureStatistics]:
    """Return the statistics of `blocks` random parts of features (N, D) whose sizes differ by one at most.

    The parts are random because images often come sorted by class, and each block should represent all of them.
    """
    part_of = assign_random_parts(len(features), blocks, seed)
    parts = [FeatureStatistics(features.shape[1]) for _ in range(blocks)]
    for index, part in enumerate(parts):
        part.update(features[part_of == index])
    return parts


def merge_blocks(blocks: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """Return the statistics of all features that the blocks have seen."""
    merged = FeatureStatistics(len(blocks[0].mean))
    for block in blocks:
        merged.merge(block)
    return merged


def jackknife_error(blocks: Sequence[FeatureStatistics], measure: Measure) -> float:
    """Return the jackknife standard error of measure(all blocks), which leaves out one block at a time.

    It covers drawing other samples, but neither training the model again nor another reference. Raises the same errors
    as measure_without_each.
    """
    return spread_error(measure_without_each(blocks, measure))


def spread_error(left_out: Array) -> float:
    """Return the jackknife standard error from the result (K,) of measure_without_each.

    sqrt((K - 1) / K sum_k (measure without block k - their mean)^2) for K equal blocks (Efron & Stein 1981).
    """
    return float(np.sqrt((len(left_out) - 1) * left_out.var()))


def measure_without_each(blocks: Sequence[FeatureStatistics], measure: Measure) -> Array:
    """Return (K,): the measure of all blocks but block k, for every k.

    Raises ValueError for fewer than 2 blocks, or fewer than 2 samples without one of them.
    """
    merged = merge_blocks(blocks)
    if len(blocks) < 2 or merged.n - max(block.n for block in blocks) < 2:
        raise ValueError(
            f"Found {merged.n} samples in {len(blocks)} blocks, expected at least 2 blocks and 2 samples without any "
            "one of them. Add samples, or make fewer blocks."
        )
    return np.array([measure(merged.without(block)) for block in blocks])


def measure_growing_subsets(
    blocks: Sequence[FeatureStatistics], measure: Measure, smallest: int = 2
) -> list[tuple[int, float]]:
    """Return (N, measure) for the first block, the first two, ... and all blocks, where N is at least `smallest`."""
    points, grown = [], FeatureStatistics(len(blocks[0].mean))
    for block in blocks:
        grown.merge(block)
        if grown.n >= smallest:
            points.append((grown.n, measure(grown)))
    return points


class Extrapolation(NamedTuple):
    """A straight line through a measure as a function of 1 / N."""

    value: float
    """Value of the line at 1 / N = 0."""
    slope: float
    """The measure's bias at N is slope / N."""
    error: float
    """Standard error of `value`."""


def extrapolate(points: Sequence[tuple[int, float]], error: float = 0.0) -> Extrapolation:
    """Extrapolate a measure to infinite N: fit value + slope / N to points (N, measure) by least squares.

    Source: Chong & Forsyth 2020 (arXiv 1911.07023), who call it FID infinity. Nested subsets rise and fall together,
    which residuals do not show. So the standard error combines that of the line and `error`, that of the largest
    subset's measure, as the root of their sum of squares. For Gaussians it is 0.85 of the spread over repeated draws;
    the line's alone is 0.3 of it.
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
