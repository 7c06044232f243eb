"""Ratios of Frechet distances to those of held-out real images, their mean over extractors, and the errors of both.

A distance in one feature space can be lowered without better images, by training on it. Its ratio to that of real
images says how far samples are from real ones in a unit that feature spaces share, and the mean over several spaces is
hard to lower without better images.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metric_names import RATIO, mean_ratio_name, metric_name, parse_metric_name

Array = np.ndarray
Deviations = list[list[float]]
"""By how much a ratio deviates when block k of the samples is left out, and when block k of the real images is: two
lists of K numbers with mean zero; empty lists where there were too few images for blocks."""


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


class RatioRow(NamedTuple):
    """A ratio as tables and pages show it."""

    name: str
    title: str
    """The feature space, such as "inception" or "mean of inception and dinov2-vit-l-14"."""
    value: float | None
    """The ratio; None if there is none, for the reason in `reason`."""
    error: float | None
    reason: str

    @property
    def cells(self) -> list[str]:
        """The cells of a text table."""
        if self.value is None:
            return [self.name, "-", self.reason]
        error = "" if self.error is None else f" +- {self.error:.4g}"
        return [self.name, f"{self.value:.6g}{error}", f"times real images, {self.title}"]


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

    Block k holds the same images whatever the extractor, so that the mean of the deviations is the deviation of the
    mean, and the error of the mean includes how the ratios rise and fall together.
    """
    value = float(np.mean([ratio.value for ratio in ratios]))
    if not all(all(ratio.deviations) for ratio in ratios):
        return Ratio(value, [[], []])
    sides = zip(*(ratio.deviations for ratio in ratios), strict=True)
    return Ratio(value, [np.mean(side, axis=0).tolist() for side in sides])


class MeanRatios(NamedTuple):
    """What a report by several extractors adds to their ratios: the mean at each N, by its name."""

    metrics: dict[str, float]
    errors: dict[str, float]
    missing: dict[str, str]
    """Why there is no mean, where extractors should have had a ratio."""
    averaged: dict[str, list[str]]
    """The extractors whose ratios a mean is of."""


def average_over_extractors(
    extractors: Sequence[str],
    metrics: Mapping[str, float],
    deviations: Mapping[str, Deviations],
    missing: Mapping[str, str],
) -> MeanRatios:
    """Return the means of the ratios of Frechet distances at each N at which two or more extractors have one.

    metrics, deviations, missing: of all extractors, by the names of metrics; see evaluation.report.EvaluationReport.
    """
    found = MeanRatios({}, {}, {}, {})
    parsed = {name: parse_metric_name(name) for name in (*metrics, *missing)}
    for count in sorted({parts.num_samples for parts in parsed.values() if parts.kind.name == f"{RATIO}fd"}):
        names = {extractor: metric_name(f"{RATIO}fd", extractor, count) for extractor in extractors}
        known = {extractor: name for extractor, name in names.items() if name in metrics}
        mean_name = mean_ratio_name(count)
        if len(known) > 1:
            mean = average_ratios([Ratio(metrics[name], deviations.get(name, [[], []])) for name in known.values()])
            found.metrics[mean_name], found.averaged[mean_name] = mean.value, list(known)
            if (error := mean.error) is not None:
                found.errors[mean_name] = error
        elif sum(name in parsed for name in names.values()) > 1:
            found.missing[mean_name] = "fewer than 2 extractors have a ratio"
    return found


def same_held_out(digests: Iterable[str]) -> set[str]:
    """Return which digests of held-out images mark ratios that are comparable, given those of all ratios.

    The most frequent one, and the empty one of reports that do not say which images they are.
    """
    return {"", *(digest for digest, _ in Counter(filter(None, digests)).most_common(1))}


def mean_ratio_id(protocol_ids: Iterable[str]) -> str:
    """Return the id of the protocols that a mean ratio is over, whatever their order: only means of one id compare."""
    return hashlib.sha256("\n".join(sorted(protocol_ids)).encode()).hexdigest()[:12]
