"""From the features of samples and of real images to the numbers of a report."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from evaluation.extractors import Features
from evaluation.metric_names import RATIO, metric_name
from evaluation.protocol import EvaluationProtocol
from evaluation.ratios import Ratio, measure_ratio
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from evaluation.score import Score, score


def build_report(
    protocol: EvaluationProtocol,
    samples: Features,
    reference: ReferenceStatistics,
    held_out: Features | None,
    *,
    checkpoint: str,
    digest: str,
    num_constant: int = 0,
    metrics: Collection[str] = (),
) -> EvaluationReport:
    """Score the samples, and held-out real images as their baseline, against a reference.

    The baseline is of as many images as the score it is read against, because Frechet distance is biased in N: of at
    most protocol.num_samples held-out images; if there are fewer of them, that many samples are scored as well. The
    ratio of both is what several extractors have in common.
    checkpoint, digest: what the samples are of. num_constant: how many of them are of a single colour. metrics: what a
    recipe asks for besides (evaluate.metrics).
    """
    generated = _score(samples, reference, protocol, protocol.num_samples, further=metrics)
    real_baseline, scores, found = {}, dict(generated.metrics), Ratios({}, {})
    if held_out is not None:
        count = min(len(held_out.features), protocol.num_samples)
        needed = fewest_images(reference)
        options: dict[str, Any] = {"errors": False, "left_out": count >= min(needed.values()), "further": metrics}
        is_all = count == len(held_out.features)
        spaced = held_out if is_all else _take(held_out, spaced_positions(len(held_out.features), count))
        real, scored = _score(spaced, reference, protocol, count, **options), generated
        if count < protocol.num_samples:
            # Samples are alike in any order, but given images often lie in that of their classes.
            given = protocol.is_of_given_images
            which = scattered_positions(protocol.num_samples, count) if given else slice(count)
            scored = _score(_take(samples, which), reference, protocol, count, **options)
        real_baseline, scores = real.metrics, scores | scored.metrics
        found = compute_ratios(scored, real, needed, protocol.extractor, count)
    defect = find_defect(samples.features, num_constant)
    warnings = [f"{defect}: this can be neither the best checkpoint nor a champion."] if defect else []
    return EvaluationReport(
        protocol=protocol,
        checkpoint=checkpoint,
        checkpoint_digest=digest,
        metrics=scores | {name: ratio.value for name, ratio in found.ratios.items()},
        errors=generated.errors
        | {name: ratio.error for name, ratio in found.ratios.items() if ratio.error is not None},
        real_baseline=real_baseline,
        curve=generated.curve,
        warnings=[*warnings, *generated.warnings],
        missing=generated.missing | found.missing,
        disqualified=defect,
        deviations={name: ratio.deviations for name, ratio in found.ratios.items() if all(ratio.deviations)},
    )


def with_reconstructions(
    report: EvaluationReport, reconstructed: Features, reference: ReferenceStatistics
) -> EvaluationReport:
    """Return a report with a second baseline: held-out images that the autoencoder has encoded and decoded."""
    count = len(reconstructed.features)
    return replace(
        report, reconstructions=_score(reconstructed, reference, report.protocol, count, errors=False).metrics
    )


class Ratios(NamedTuple):
    """The ratios of metrics of samples to those of real images, by their names."""

    ratios: dict[str, Ratio]
    missing: dict[str, str]
    """Name of a ratio that could not be computed -> why."""


def fewest_images(reference: ReferenceStatistics) -> dict[str, int]:
    """Return for each metric that has a ratio how many images it needs: one more than twice its dimensions.

    These are the Frechet distances, which are biased in N, so that those of real images are above zero; unbiased
    metrics, such as the kernel distance, are about zero for real images. Of fewer images a covariance is mostly noise,
    and the distances of samples and of real images mostly one bias: their ratio would be near 1 whatever the samples.
    """
    means = {"fd": reference.mu, "sfd": reference.mu_s}
    return {kind: 2 * len(mean) + 1 for kind, mean in means.items() if mean is not None}


def compute_ratios(samples: Score, real: Score, needed: dict[str, int], extractor: str, count: int) -> Ratios:
    """Return the ratios of samples to real images, `count` of each. needed: as fewest_images gives it."""
    found = Ratios({}, {})
    for kind, fewest in needed.items():
        metric = metric_name(kind, extractor, count)
        if metric not in samples.metrics:
            continue
        if count < fewest:
            found.missing[RATIO + metric] = f"{count:,} images, and at least {fewest:,} are needed"
        elif real.metrics[metric] == 0:
            found.missing[RATIO + metric] = "real images at distance 0, because the reference holds the same ones"
        else:
            left_out = (samples.left_out.get(metric), real.left_out.get(metric))
            found.ratios[RATIO + metric] = measure_ratio(samples.metrics[metric], real.metrics[metric], *left_out)
    return found


def spaced_positions(length: int, count: int) -> np.ndarray:
    """Return `count` positions, at most `length`, evenly spaced: images often lie in the order of their classes."""
    return np.arange(count) * length // max(count, 1)


def scattered_positions(length: int, count: int, seed: int = 2020) -> np.ndarray:
    """Return `count` positions in order, at most `length`: one at random of each of `count` equal stretches.

    They represent images that lie in the order of their classes as well as images of each class in turn, of which
    spaced_positions may take a single class.
    """
    bounds = np.arange(count + 1) * length // max(count, 1)
    return bounds[:-1] + np.random.RandomState(seed).randint(np.diff(bounds))


def find_defect(features: np.ndarray, num_constant: int) -> str:
    """Return in words why samples can be of no sound checkpoint, although they have scores; empty if they can.

    features: (N, D). num_constant: how many samples are of a single colour.
    """
    if 2 * num_constant > len(features):
        return f"{num_constant:,} of {len(features):,} samples are of a single colour"
    if (features == features[0]).all():
        return f"all {len(features):,} samples have the same features"
    return ""


def _score(
    images: Features,
    reference: ReferenceStatistics,
    protocol: EvaluationProtocol,
    count: int,
    *,
    errors: bool = True,
    left_out: bool = False,
    further: Collection[str] = (),
) -> Score:
    return score(
        images.features,
        images.logits,
        reference,
        extractor=protocol.extractor,
        num_samples=count,
        spatial=images.spatial,
        errors=errors,
        left_out=left_out,
        further=further,
    )


def _take(images: Features, which: np.ndarray | slice) -> Features:
    logits, spatial = (None if array is None else array[which] for array in (images.logits, images.spatial))
    return Features(images.features[which], logits, spatial)
