"""Errors and extrapolations against closed forms on Gaussians and against repeated draws."""

import numpy as np
import pytest

from evaluation.metrics import frechet_distance
from evaluation.statistics import FeatureStatistics
from evaluation.uncertainty import (
    compute_block_statistics,
    extrapolate,
    jackknife_error,
    measure_growing_subsets,
    merge_blocks,
)


def distance_to_standard(statistics):
    dim = len(statistics.mean)
    return frechet_distance(np.zeros(dim), np.eye(dim), statistics.mean, statistics.cov)


def test_merged_blocks_have_the_statistics_of_all_features():
    features = np.random.RandomState(0).randn(997, 6) * 3 + 50
    blocks = compute_block_statistics(features, 10)
    assert sorted({block.n for block in blocks}) == [99, 100]
    whole = merge_blocks(blocks)
    assert whole.n == 997
    np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(whole.cov, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-11)


def test_blocks_of_sorted_samples_have_similar_means():
    """Sorted by class, contiguous blocks would each be a class."""
    sorted_features = np.repeat(np.arange(10.0), 100)[:, None] @ np.ones((1, 2))
    assert max(abs(block.mean[0] - 4.5) for block in compute_block_statistics(sorted_features, 10)) < 1


def test_jackknife_of_a_mean_is_its_standard_error():
    """For blocks of one sample exactly s / sqrt(N)."""
    values = np.random.RandomState(0).randn(40, 1)
    error = jackknife_error(compute_block_statistics(values, 40), lambda statistics: statistics.mean[0])
    assert error == pytest.approx(values.std(ddof=1) / 40**0.5, rel=1e-12)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (0.0, 1.6), (0.4, 0.7)])
def test_jackknife_of_a_gaussians_distance_is_the_closed_form(mean, std):
    """d = m^2 + (s - 1)^2 in one dimension: var d = (4 m^2 s^2 + 2 (s - 1)^2 s^2) / N to first order."""
    n, draws = 2000, 60
    expected = ((4 * mean**2 + 2 * (std - 1) ** 2) * std**2 / n) ** 0.5
    rng = np.random.RandomState(0)
    squares = []
    for _ in range(draws):
        blocks = compute_block_statistics(mean + std * rng.randn(n, 1), 20)
        squares.append(jackknife_error(blocks, distance_to_standard) ** 2)
    assert np.mean(squares) ** 0.5 == pytest.approx(expected, rel=0.1)


def test_jackknife_refuses_too_few_blocks_or_samples():
    with pytest.raises(ValueError, match="Found 20 samples in 1 blocks, expected at least 2 blocks"):
        jackknife_error(compute_block_statistics(np.zeros((20, 2)), 1), distance_to_standard)
    with pytest.raises(ValueError, match="Found 2 samples in 2 blocks.*2 samples without"):
        jackknife_error(compute_block_statistics(np.zeros((2, 2)), 2), distance_to_standard)


def test_taking_a_part_out_is_the_inverse_of_merging():
    features = np.random.RandomState(1).randn(300, 4) + 100
    parts = [FeatureStatistics(4), FeatureStatistics(4)]
    for part, rows in zip(parts, np.split(features, [70]), strict=True):
        part.update(rows)
    rest = merge_blocks(parts).without(parts[0])
    assert rest.n == parts[1].n == 230
    np.testing.assert_allclose(rest.mean, parts[1].mean, rtol=1e-13)
    np.testing.assert_allclose(rest.cov, parts[1].cov, rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="part of 230 samples, expected fewer than all 230"):
        parts[1].without(parts[1])


def test_a_line_in_one_over_n_is_found_exactly():
    points = [(n, 7.5 + 300 / n) for n in (100, 200, 400, 1000)]
    assert extrapolate(points) == pytest.approx((7.5, 300, 0), abs=1e-9)
    assert extrapolate(points, error=0.25).error == pytest.approx(0.25)
    with pytest.raises(ValueError, match="Found 2 points, expected at least 3"):
        extrapolate(points[:2])


def test_growing_subsets_are_the_first_blocks():
    features = np.random.RandomState(0).randn(50, 3)
    points = measure_growing_subsets(compute_block_statistics(features, 5), distance_to_standard, smallest=25)
    assert [n for n, _ in points] == [30, 40, 50]
    expected = frechet_distance(np.zeros(3), np.eye(3), features.mean(axis=0), np.cov(features, rowvar=False))
    assert points[-1][1] == pytest.approx(expected, rel=1e-10)


def test_at_infinity_the_distance_of_gaussians_has_lost_its_bias_and_knows_its_error():
    """200 draws of 400 samples: the mean is the true distance, the error near the draws' own spread."""
    dim, n, scale = 4, 400, np.linspace(0.6, 1.4, 4)
    true = ((scale - 1) ** 2).sum()
    rng = np.random.RandomState(0)
    plain, fits = [], []
    for _ in range(200):
        blocks = compute_block_statistics(rng.randn(n, dim) * scale, 10)
        points = measure_growing_subsets(blocks, distance_to_standard, smallest=2 * dim)
        plain.append(points[-1][1])
        fits.append(extrapolate(points, jackknife_error(blocks, distance_to_standard)))
    values, errors = np.array([(fit.value, fit.error) for fit in fits]).T
    uncertainty = values.std() / len(values) ** 0.5
    assert np.mean(plain) - true > 4 * uncertainty  # biased upwards
    assert abs(values.mean() - true) < 2 * uncertainty
    assert 0.7 < (errors**2).mean() ** 0.5 / values.std() < 1.2
