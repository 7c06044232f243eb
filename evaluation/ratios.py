"""Ratios of Frechet distances to those of held-out real images, their mean over extractors, and the errors of both.

A distance in one feature space can be lowered without better images, by training on it. Its ratio to that of real images
says how far samples are from real ones in a unit that feature spaces share, and the mean over several spaces is hard to
lower without better images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Deviations = list[list[float]]
"""By how much a ratio deviates when block k of the samples is left out, and when block k of the real images is: two
lists of K numbers with mean zero; empty lists where there were too few images for blocks."""

RATIO_KINDS = ("fd", "sfd")
"""Metrics that have a ratio. A Frechet distance is biased in N, so that of real images is above zero; unbiased metrics,
such as the kernel distance, are about zero for real images."""


class Ratio(NamedTuple):
    """A ratio, or a mean of ratios, and what its error follows from."""

    value: float
    deviations: Deviations

    @property
    def error(self) -> float | None:
        """The standard error; None without deviations.

        Samples and real images are drawn independently, so the squares of their two shares are added:
        sqrt(sum over both of (K - 1) / K sum_k deviation_k^2). It covers drawing other samples and holding out other
        real images, but neither training the model again nor another reference.
        """
        if not all(self.deviations):
            return None
        return float(np.sqrt(sum((len(side) - 1) * np.mean(np.square(side)) for side in self.deviations)))


def measure_ratio(samples: float, real: float, samples_left_out: Array | None, real_left_out: Array | None) -> Ratio:
    """Return the ratio of a distance of samples to that of real images.

    samples_left_out, real_left_out: these distances (K,) without each block of images, see
    evaluation.uncertainty.measure_without_each; None: unknown. The deviations are those of the delta method,
    d(a / b) = da / b - (a / b) db / b, with the jackknife's da_k = a_k - mean a and db_k = b_k - mean b.
    Raises ValueError if real images have no distance above zero.
    """
    if not real > 0:
        raise ValueError(f"Found {real} as the distance of real images, expected more than 0. Hold out other images.")
    if samples_left_out is None or real_left_out is None:
        return Ratio(samples / real, [[], []])
    of_samples = (samples_left_out - samples_left_out.mean()) / real
    of_real = -samples / real**2 * (real_left_out - real_left_out.mean())
    return Ratio(samples / real, [of_samples.tolist(), of_real.tolist()])


def average_ratios(ratios: Sequence[Ratio]) -> Ratio:
    """Return the mean of the ratios of the same images by several extractors.

    Block k holds the same images whatever the extractor, so that the mean of the deviations is the deviation of the mean,
    and the error of the mean includes how the ratios rise and fall together.
    """
    value = float(np.mean([ratio.value for ratio in ratios]))
    if not all(all(ratio.deviations) for ratio in ratios):
        return Ratio(value, [[], []])
    sides = zip(*(ratio.deviations for ratio in ratios), strict=True)
    return Ratio(value, [np.mean(side, axis=0).tolist() for side in sides])
