"""From the features of samples and of real images to the numbers of a report."""

import numpy as np

from evaluation.extractors import Features
from evaluation.protocol import EvaluationProtocol
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
    reconstructed: Features | None = None,
) -> EvaluationReport:
    """Score the samples, and held-out real images as their baseline, against a reference.

    The baseline is of as many images as the score it is read against, because Frechet distance is biased in N: of at
    most protocol.num_samples held-out images; if there are fewer of them, that many samples are scored as well.
    checkpoint, digest: what the samples are of. num_constant: how many of them are of a single colour. reconstructed:
    the second baseline, held-out images that the autoencoder has encoded and decoded.
    """
    generated = _score(samples, reference, protocol, protocol.num_samples)
    real_baseline, metrics = {}, dict(generated.metrics)
    if held_out is not None:
        count = min(len(held_out.features), protocol.num_samples)
        spaced = _take(held_out, spaced_positions(len(held_out.features), count))
        real_baseline = _score(spaced, reference, protocol, count, errors=False).metrics
        if count < protocol.num_samples:
            metrics |= _score(_take(samples, slice(count)), reference, protocol, count, errors=False).metrics
    reconstructions = {}
    if reconstructed is not None:
        count = len(reconstructed.features)
        reconstructions = _score(reconstructed, reference, protocol, count, errors=False).metrics
    defect = find_defect(samples.features, num_constant)
    warnings = [f"{defect}: this can be neither the best checkpoint nor a champion."] if defect else []
    return EvaluationReport(
        protocol=protocol,
        checkpoint=checkpoint,
        checkpoint_digest=digest,
        metrics=metrics,
        errors=generated.errors,
        real_baseline=real_baseline,
        reconstructions=reconstructions,
        curve=generated.curve,
        warnings=[*warnings, *generated.warnings],
        missing=generated.missing,
        disqualified=defect,
    )


def spaced_positions(length: int, count: int) -> np.ndarray:
    """Return `count` positions, at most `length`, evenly spaced: images often lie in the order of their classes."""
    return np.arange(count) * length // max(count, 1)


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
    images: Features, reference: ReferenceStatistics, protocol: EvaluationProtocol, count: int, errors: bool = True
) -> Score:
    return score(
        images.features,
        images.logits,
        reference,
        extractor=protocol.extractor,
        num_samples=count,
        spatial=images.spatial,
        errors=errors,
    )


def _take(images: Features, which: np.ndarray | slice) -> Features:
    logits, spatial = (None if array is None else array[which] for array in (images.logits, images.spatial))
    return Features(images.features[which], logits, spatial)
