"""Ratios to real images, their mean over extractors, and their errors against naive loops and repeated draws."""

import numpy as np
import pytest

from evaluation.metrics import frechet_distance
from evaluation.ratios import average_ratios, measure_ratio
from evaluation.reference import ReferenceStatistics
from evaluation.score import score
from evaluation.statistics import assign_random_parts

DIM = 3


def reference_of(dim=DIM):
    return ReferenceStatistics(n=100, mu=np.zeros(dim), sigma=np.eye(dim), extractor="e", extractor_sha256="ab")


def distance(features):
    return frechet_distance(features.mean(axis=0), np.cov(features, rowvar=False), np.zeros(DIM), np.eye(DIM))


def naive_left_out(features, blocks=10):
    part_of = assign_random_parts(len(features), blocks)
    return np.array([distance(features[part_of != block]) for block in range(blocks)])


def ratio_of(samples, real):
    scores = [
        score(each, None, reference_of(), extractor="e", num_samples=len(each), errors=False, left_out=True)
        for each in (samples, real)
    ]
    (values, reals), left_out = (each.metrics for each in scores), [each.left_out for each in scores]
    name = f"fd_e_{len(samples)}"
    return measure_ratio(values[name], reals[name], left_out[0].get(name), left_out[1].get(name))


@pytest.fixture
def spaces():
    """Two feature spaces of the same 200 samples and 200 real images, in which samples deviate together."""
    rng = np.random.RandomState(0)
    samples, real = rng.randn(200, DIM) * 1.3 + 0.5, rng.randn(200, DIM)
    turned = samples @ np.array([[1.0, 0.5, 0], [0, 1, 0.2], [0.3, 0, 1]])
    return [(samples, real), (turned, real * np.array([1.0, 1.2, 0.9]))]


def test_the_error_of_a_ratio_is_that_of_a_naive_loop(spaces):
    samples, real = spaces[0]
    found, a, b = ratio_of(samples, real), distance(samples), distance(real)
    errors = [(9 / 10 * ((each - each.mean()) ** 2).sum()) ** 0.5 for each in map(naive_left_out, (samples, real))]
    assert found.value == pytest.approx(a / b, rel=1e-9)
    assert found.error == pytest.approx(a / b * np.hypot(errors[0] / a, errors[1] / b), rel=1e-6)


def test_the_error_of_a_mean_is_that_of_the_gradient_and_the_jackknifes_covariance(spaces):
    """The mean of a1 / b1 and a2 / b2: its variance is g' C g with g = (1 / b1, 1 / b2) / 2 for the samples, and
    -(a1 / b1^2, a2 / b2^2) / 2 for the real images."""
    found = average_ratios([ratio_of(*space) for space in spaces])
    a, b = (np.array([distance(space[side]) for space in spaces]) for side in (0, 1))
    assert found.value == pytest.approx((a / b).mean(), rel=1e-9)
    variance = 0.0
    for side, gradient in ((0, 1 / b / 2), (1, -a / b**2 / 2)):
        left_out = np.stack([naive_left_out(space[side]) for space in spaces])
        variance += gradient @ (9 * np.cov(left_out, ddof=0)) @ gradient
    assert found.error == pytest.approx(variance**0.5, rel=1e-6)


def test_spaces_that_agree_do_not_make_the_mean_more_certain(spaces):
    ratio = ratio_of(*spaces[0])
    twice = average_ratios([ratio, ratio])
    assert twice.value == ratio.value and twice.error == pytest.approx(ratio.error, rel=1e-12)


def test_the_error_is_near_the_spread_over_repeated_draws():
    rng, found = np.random.RandomState(1), []
    for _ in range(150):
        found.append(ratio_of(rng.randn(300, DIM) * 1.3 + 0.5, rng.randn(300, DIM) + 0.6))
    spread = np.std([ratio.value for ratio in found])
    assert 0.8 < np.mean([ratio.error**2 for ratio in found]) ** 0.5 / spread < 1.25


def test_too_few_images_for_blocks_have_a_ratio_without_an_error(spaces):
    few = [ratio_of(samples[:15], real[:15]) for samples, real in spaces]
    assert few[0].error is None and average_ratios(few).error is None
    assert average_ratios(few).value == pytest.approx((few[0].value + few[1].value) / 2)


def test_a_distance_of_zero_has_no_ratio():
    with pytest.raises(ValueError, match="0.0 as the distance of real images, expected more than 0"):
        measure_ratio(1.0, 0.0, None, None)
