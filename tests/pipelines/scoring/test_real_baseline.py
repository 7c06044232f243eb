"""The real baseline has as many images as the score that it is read against."""

import numpy as np
import pytest

from evaluation.extractors import Features
from evaluation.metrics import frechet_distance
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from pipelines.scoring.build_report import build_report

DIM, CLASSES = 4, 3
REFERENCE = ReferenceStatistics(
    n=100, mu=np.zeros(DIM), sigma=np.eye(DIM), extractor="efficientnet-lite0", extractor_sha256="ab"
)


def images(count, seed):
    """Features of images in the order of their classes; every class has another mean."""
    offset = np.repeat(np.arange(CLASSES), -(-count // CLASSES))[:count, None]
    return Features((np.random.RandomState(seed).randn(count, DIM) + 3 * offset).astype(np.float32))


def distance(features):
    wide = features.astype(np.float64)
    return frechet_distance(wide.mean(axis=0), np.cov(wide, rowvar=False), REFERENCE.mu, REFERENCE.sigma)


def report(num_samples, held_out):
    protocol = EvaluationProtocol(
        decoder="aa",
        extractor="efficientnet-lite0",
        extractor_sha256="ab",
        reference_digest="cc",
        num_samples=num_samples,
    )
    return build_report(protocol, images(num_samples, 0), REFERENCE, held_out, checkpoint="x", digest="y")


def test_of_more_held_out_images_as_many_count_from_all_classes():
    held_out = images(90, 1)
    found = report(30, held_out)
    assert {name.rpartition("_")[2] for name in (*found.metrics, *found.real_baseline)} == {"30"}
    rows = held_out.features[::3]  # ten of each class, not the first class alone
    assert found.real_baseline["fd_efficientnet_lite0_30"] == pytest.approx(distance(rows), rel=1e-9)


def test_beside_fewer_held_out_images_as_many_samples_are_scored_too():
    held_out = images(12, 1)
    found = report(30, held_out)
    assert found.real_baseline["fd_efficientnet_lite0_12"] == pytest.approx(distance(held_out.features), rel=1e-9)
    first = images(30, 0).features[:12]
    assert found.metrics["fd_efficientnet_lite0_12"] == pytest.approx(distance(first), rel=1e-9)
    assert "fd_efficientnet_lite0_30" in found.metrics


def test_without_held_out_images_there_is_no_real_baseline():
    assert report(30, None).real_baseline == {}
