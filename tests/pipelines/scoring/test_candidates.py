"""What a search measures of a candidate besides its distance."""

import numpy as np
import pytest

from evaluation.extractors import Features
from evaluation.metrics import frechet_distance
from evaluation.reference import ReferenceStatistics
from pipelines.scoring.candidates import RealFeatures


def test_ratios_need_as_many_images_as_in_reports():
    rng = np.random.default_rng(0)
    real, held_out, samples = rng.normal(size=(200, 8)), rng.normal(size=(40, 8)), rng.normal(1, 1, size=(60, 8))
    reference = ReferenceStatistics(
        n=200, mu=real.mean(0), sigma=np.cov(real, rowvar=False), extractor="x", extractor_sha256="x"
    )
    of_real = RealFeatures.of(reference, Features(held_out))
    mean, cov = samples[:40].mean(0), np.cov(samples[:40], rowvar=False)
    distance = frechet_distance(reference.mu, reference.sigma, mean, cov)
    floor = frechet_distance(reference.mu, reference.sigma, held_out.mean(0), np.cov(held_out, rowvar=False))
    assert of_real.ratio(samples) == pytest.approx(distance / floor)
    assert of_real.ratio(samples[:16]) is None  # of 17, twice the dimensions and one, there would be one
    assert of_real.ratio(samples[:17]) is not None
