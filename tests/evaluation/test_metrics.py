"""Metrics against closed forms and against torch-fidelity on the same features."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation import neighbours
from evaluation.metrics import (
    cmmd,
    frechet_distance,
    frechet_distance_of,
    inception_score,
    kernel_distance,
    manifold_scores,
    median_distance,
    mind,
    precision_recall,
    rbf_mmd,
)


def features(n, dim, seed=0, shift=0.0):
    """Correlated, skewed and non-negative, like pooled activations."""
    rng = np.random.RandomState(seed)
    mixing = np.random.RandomState(dim).randn(dim, dim) / np.sqrt(dim)
    return np.maximum(rng.randn(n, dim) @ mixing + 0.3 + shift, 0).astype(np.float32)


def moments(x):
    x = x.astype(np.float64)
    return x.mean(axis=0), np.cov(x, rowvar=False)


# Frechet distance


@pytest.mark.parametrize(("n1", "n2"), [(600, 500), (100, 600), (40, 30)])
def test_frechet_distance_equals_torch_fidelity(n1, n2):
    """The last two have fewer samples than dimensions: singular covariances."""
    x, y = features(n1, 128, 1), features(n2, 128, 2, shift=0.1)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(torch.from_numpy(x).double()),
        fid_features_to_statistics(torch.from_numpy(y).double()),
        verbose=False,
    )
    ours = frechet_distance(*moments(x), *moments(y))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.RandomState(0)
    basis = np.linalg.qr(rng.randn(50, 50))[0]
    variances1, variances2 = rng.rand(50) + 0.1, rng.rand(50) + 0.1
    mean1, mean2 = rng.randn(50), rng.randn(50)
    expected = ((mean1 - mean2) ** 2).sum() + ((np.sqrt(variances1) - np.sqrt(variances2)) ** 2).sum()
    ours = frechet_distance(mean1, (basis * variances1) @ basis.T, mean2, (basis * variances2) @ basis.T)
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("smallest", [1e-6, 1e-12, 1e-18, 0.0])
def test_frechet_distance_of_ill_conditioned_gaussians_is_the_closed_form(smallest):
    rng = np.random.RandomState(1)
    basis = np.linalg.qr(rng.randn(60, 60))[0]
    variances = np.geomspace(1.0, 1e-6, 60)
    variances[30:] = smallest
    cov = (basis * variances) @ basis.T
    scaled = frechet_distance(np.zeros(60), cov, np.zeros(60), 4 * cov)
    assert scaled == pytest.approx(variances.sum(), rel=1e-6)  # (sqrt(4 v) - sqrt(v))^2 = v


@pytest.mark.parametrize("n", [40, 600])
def test_frechet_distance_of_a_set_to_itself_is_zero(n):
    mean, cov = moments(features(n, 128))
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-5 * np.trace(cov)


@pytest.mark.parametrize("n", [30, 100])
def test_frechet_distance_of_fewer_samples_than_dimensions_is_exact(n):
    """Centred samples have as many singular values as the product of covariances has eigenvalues that are not zero."""
    scales = np.exp(-np.arange(256) / 30)
    x, y = features(500, 256, 1) * scales, features(n, 256, 2) * scales
    (mean1, cov1), (mean2, cov2) = moments(x), moments(y)
    centred = (y - mean2) / np.sqrt(n - 1)
    roots = np.sqrt(np.sort(np.linalg.eigvalsh(centred @ cov1 @ centred.T))[1:]).sum()
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n", [2, 30, 128, 129, 400])
def test_the_frechet_distance_of_features_is_that_of_their_moments(n):
    mean, cov = moments(features(500, 128, 1))
    samples = features(n, 128, 2, shift=0.1)
    assert frechet_distance_of(mean, cov)(samples) == pytest.approx(
        frechet_distance(mean, cov, *moments(samples)), rel=1e-9
    )


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_images_on_either_side_have_the_distance_of_a_point(value):
    """|mean1 - mean2|^2 + tr(cov1) + tr(cov2): one covariance is zero, and so is the cross term."""
    x, equal = features(40, 16), np.full((30, 16), value, np.float32)
    mean, cov = moments(x)
    point, zero = np.full(16, np.float64(np.float32(value))), np.zeros((16, 16))
    expected = ((mean - point) ** 2).sum() + np.trace(cov)
    assert frechet_distance(mean, cov, point, zero) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(point, zero, mean, cov) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance_of(point, zero)(x) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance_of(mean, cov)(equal) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(point, zero, point + 0.5, zero) == pytest.approx(16 * 0.25, rel=1e-12)
    assert frechet_distance_of(point + 0.5, zero)(equal) == pytest.approx(16 * 0.25, rel=1e-12)
    assert frechet_distance(point, zero, point, zero) == 0


def test_frechet_distance_is_symmetric():
    a, b = moments(features(50, 64, 1)), moments(features(300, 64, 2))
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-7)


def test_frechet_distance_refuses_other_dimensions_and_nan():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\).*expected"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="NaN.*expected finite"):
        frechet_distance(np.zeros(3), np.eye(3) * np.nan, np.zeros(3), np.eye(3))


# Inception Score


@pytest.mark.parametrize("n", [10, 997, 2000])
def test_inception_score_equals_torch_fidelity(n):
    logits = features(n, 100) * 8
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020)
    mean, std = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_inception_score_of_certain_balanced_classes_is_their_number():
    logits = np.tile(np.eye(10), (1000, 1)) * 1e4  # probabilities underflow to exactly 0 and 1
    assert inception_score(logits, splits=1)[0] == pytest.approx(10)


def test_inception_score_of_equal_predictions_is_one():
    assert inception_score(np.tile(np.arange(5.0), (50, 1))) == pytest.approx((1.0, 0.0), abs=1e-12)


# Kernel distance


def torch_fidelity_kid(x, y, subsets, size):
    out = kid_features_to_metric(
        torch.from_numpy(x).double(),
        torch.from_numpy(y).double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=2020,
        verbose=False,
    )
    return out["kernel_inception_distance_mean"], out["kernel_inception_distance_std"]


@pytest.mark.parametrize(("n1", "n2", "subsets", "size"), [(300, 250, 20, 100), (700, 600, 4, 100), (120, 400, 9, 120)])
def test_kernel_distance_equals_torch_fidelity(n1, n2, subsets, size):
    """Overlapping subsets (values shared), sparse subsets (values per subset), and subsets of everything."""
    x, y = features(n1, 64, 1), features(n2, 64, 2, shift=0.05)
    ours = kernel_distance(x, y, subsets=subsets, subset_size=size)
    assert ours == pytest.approx(torch_fidelity_kid(x, y, subsets, size), rel=1e-9)


def test_kernel_distance_does_not_depend_on_the_block_size(monkeypatch):
    x, y = features(300, 64, 1), features(250, 64, 2)
    whole = kernel_distance(x, y, subsets=20, subset_size=100)
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", 700)
    assert kernel_distance(x, y, subsets=20, subset_size=100) == pytest.approx(whole, rel=1e-10)


def test_kernel_distance_refuses_too_few_samples():
    with pytest.raises(ValueError, match="50 and 80 samples, expected at least subset_size = 1000.*subset_size=50"):
        kernel_distance(features(50, 8), features(80, 8))


# Precision and recall


def test_precision_and_recall_equal_torch_fidelity_exactly_in_float64():
    """More samples than fit a block, so that a boundary would show."""
    generated, real = features(2500, 64, 1, 0.1), features(1500, 64, 2)
    theirs = prc_features_to_metric(
        torch.from_numpy(generated).double(), torch.from_numpy(real).double(), prc_batch_size=700, verbose=False
    )
    precision, recall = precision_recall(generated, real)
    assert round(precision * 2500) == round(theirs["precision"] * 2500) not in (0, 2500)
    assert round(recall * 1500) == round(theirs["recall"] * 1500) not in (0, 1500)


@pytest.mark.parametrize("shift", [0.0, 0.2, 5.0])
def test_precision_and_recall_equal_torch_fidelity(shift):
    generated, real = features(400, 32, 1, shift), features(300, 32, 2)
    theirs = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), verbose=False)
    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(theirs["precision"], abs=1e-7)  # theirs is a float32 mean
    assert recall == pytest.approx(theirs["recall"], abs=1e-7)


@pytest.mark.parametrize("values", [20, 1000, 5000])
def test_manifold_scores_do_not_depend_on_the_block_size(monkeypatch, values):
    """Blocks of 1 row, some rows, and more rows than columns."""
    generated, real = features(200, 16, 1), features(150, 16, 2)
    whole = manifold_scores(generated, real)
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", values)
    assert manifold_scores(generated, real) == whole


def test_distances_are_never_held_all_at_once(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", 1000)
    generated, real = features(200, 16, 1), features(150, 16, 2)
    blocks = list(neighbours.iterate_squared_distances(generated, real))
    assert max(distances.size for _, distances in blocks) <= 1000
    whole = torch.cdist(torch.from_numpy(generated).double(), torch.from_numpy(real).double()) ** 2
    np.testing.assert_allclose(np.concatenate([distances for _, distances in blocks]), whole, rtol=1e-10)


def test_copies_are_inside_however_many_there_are():
    """A model that samples one image over and over: its balls have radius 0, and hold each other."""
    copies, real = np.repeat(features(1, 256, 1), 30, axis=0) * 10, features(40, 256, 2)
    assert precision_recall(copies, np.concatenate([copies, real]))[0] == 1.0
    assert precision_recall(copies, copies) == (1.0, 1.0)
    assert manifold_scores(copies, copies).coverage == 1.0


def test_precision_and_recall_of_a_set_with_itself_are_one_and_far_away_zero():
    x = features(50, 8)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 100, x) == (0.0, 0.0)


def test_first_side_is_the_generated_one():
    """Generated samples in one corner of the real set: all precise, little recalled."""
    real = np.random.RandomState(0).rand(500, 2)
    precision, recall = precision_recall(real[(real < 0.3).all(axis=1)], real)
    assert precision == 1.0 and recall < 0.5


def test_precision_recall_refuses_too_few_samples():
    with pytest.raises(ValueError, match="3 generated and 9 real samples, expected more than k = 3"):
        precision_recall(features(3, 4), features(9, 4))


# Density and coverage


def density_coverage(generated, real, k=5):
    scores = manifold_scores(generated, real, k_density=k)
    return scores.density, scores.coverage


def brute_force_density_coverage(generated, real, k):
    """Naeem et al. 2020, eq. 3 and 4, one pair at a time."""
    radii = [sorted(np.linalg.norm(real - point, axis=1))[k] for point in real]
    inside = np.array(
        [[np.linalg.norm(g - r) <= radius for g in generated] for r, radius in zip(real, radii, strict=True)]
    )
    return inside.sum() / (k * len(generated)), inside.any(axis=1).mean()


@pytest.mark.parametrize(("k", "shift"), [(5, 0.0), (2, 0.1), (5, 9.0)])
def test_density_and_coverage_are_their_definition(k, shift):
    generated, real = features(90, 8, 1, shift).astype(np.float64), features(70, 8, 2).astype(np.float64)
    expected = brute_force_density_coverage(generated, real, k)
    assert density_coverage(generated, real, k) == pytest.approx(expected, rel=1e-12)


def test_density_and_coverage_of_the_real_distribution_are_as_expected():
    """E[density] = 1; E[coverage] = 1 - (M-1)...(M-k) / ((N+M-1)...(N+M-k)): Naeem et al. 2020, Lemma 1 and 2."""
    n, m, k = 60, 40, 5
    found = [density_coverage(features(n, 4, 2 * i), features(m, 4, 2 * i + 1), k) for i in range(150)]
    missed = np.prod([(m - j) / (n + m - j) for j in range(1, k + 1)])
    density, coverage = np.mean(found, axis=0)
    density_error, coverage_error = np.std(found, axis=0) / 150**0.5
    assert abs(density - 1) < 3 * density_error < 0.1
    assert abs(coverage - (1 - missed)) < 3 * coverage_error < 0.1


def test_density_tells_outliers_and_coverage_missing_modes():
    rng = np.random.RandomState(0)
    real = np.concatenate([rng.randn(200, 2), rng.randn(200, 2) + 50])
    one_mode, outliers = rng.randn(400, 2), np.concatenate([rng.randn(200, 2), rng.randn(200, 2) - 50])
    assert density_coverage(one_mode, real)[0] > 0.8 and density_coverage(one_mode, real)[1] < 0.52
    assert density_coverage(outliers, real)[0] < 0.6


def test_one_pass_gives_all_four():
    generated, real = features(120, 8, 1, 0.1), features(100, 8, 2)
    expected = (*precision_recall(generated, real, k=3), *density_coverage(generated, real, k=5))
    assert manifold_scores(generated, real) == expected


# Nearest neighbours


def test_the_nearest_training_image_of_a_copy_is_its_original():
    training = features(60, 512, 1) * 20
    samples = np.concatenate([training[[17, 3]], features(1, 512, 2)])
    indices, distances = neighbours.find_nearest(samples, training, count=2)
    assert indices[:2, 0].tolist() == [17, 3] and distances[:2, 0].tolist() == [0, 0]
    expected = np.sort(np.linalg.norm(training.astype(np.float64) - samples[2], axis=1))[:2]
    np.testing.assert_allclose(distances[2], expected, rtol=1e-10)
    with pytest.raises(ValueError, match="60 centres, expected at least count = 61"):
        neighbours.find_nearest(samples, training, count=61)


# Kernels of the distance alone, and sliced distances


def rbf_terms(x, y, sigma):
    """Kernel matrices of x with x, of y with y and of x with y, from their definition."""

    def kernel(a, b):
        return np.array([[np.exp(-np.sum((p - q) ** 2) / (2 * sigma**2)) for q in b] for p in a])

    return kernel(x, x), kernel(y, y), kernel(x, y)


@pytest.mark.parametrize(("n", "m", "sigma"), [(30, 20, 0.7), (12, 40, 10.0)])
def test_distances_by_a_gaussian_kernel_equal_their_definitions(n, m, sigma, monkeypatch):
    x, y = features(n, 16, 1).astype(np.float64), features(m, 16, 2, shift=0.3).astype(np.float64)
    xx, yy, xy = rbf_terms(x, y, sigma)
    biased = xx.mean() + yy.mean() - 2 * xy.mean()
    unbiased = xx[~np.eye(n, dtype=bool)].mean() + yy[~np.eye(m, dtype=bool)].mean() - 2 * xy.mean()
    for block in (neighbours.BLOCK_VALUES, 64):
        monkeypatch.setattr(neighbours, "BLOCK_VALUES", block)
        assert cmmd(x, y, sigma=sigma) == pytest.approx(1000 * biased, rel=1e-9)
        assert rbf_mmd(x, y, sigma) == pytest.approx(unbiased, rel=1e-9)


def test_the_unbiased_distance_equals_torch_fidelity():
    x, y = features(200, 32, 1), features(200, 32, 2, shift=0.1)
    theirs = kid_features_to_metric(
        torch.from_numpy(x).double(),
        torch.from_numpy(y).double(),
        kid_subsets=1,
        kid_subset_size=200,
        kid_kernel="rbf",
        kid_kernel_rbf_sigma=3.0,
        verbose=False,
    )
    assert rbf_mmd(x, y, 3.0) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_cmmd_of_distant_points_is_the_closed_form():
    """Two points on one side and one far away: (1 + k) / 2 + 1 of the kernels of pairs, and 0 between the sides."""
    x, y = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[1e4, 0.0]])
    assert cmmd(x, y, sigma=5.0, scale=1.0) == pytest.approx((1 + np.exp(-0.5)) / 2 + 1)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    unit = features(50, 8, 3)
    assert cmmd(unit, unit[::-1], sigma=10.0) == pytest.approx(0, abs=1e-9)


def test_unbiased_distances_of_one_distribution_are_about_zero_on_average():
    rng = np.random.RandomState(0)
    values = [rbf_mmd(rng.randn(40, 4), rng.randn(40, 4), 1.5) for _ in range(60)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)


def test_the_kernel_needs_a_width_and_two_samples():
    with pytest.raises(ValueError, match="sigma is 0"):
        cmmd(np.zeros((3, 2)), np.zeros((3, 2)), sigma=0)
    with pytest.raises(ValueError, match="at least 2 on each side"):
        rbf_mmd(np.zeros((1, 2)), np.zeros((3, 2)), 1.0)
    with pytest.raises(ValueError, match="one D"):
        mind(np.zeros((3, 2)), np.zeros((3, 4)))


def directions_of(projections, dim, rng):
    directions = torch.randn(projections, dim, generator=rng).double()
    return (directions / directions.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 80), (70, 50)])
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_mind_is_the_mean_transport_cost_along_random_directions(n, m, order, monkeypatch):
    x, y = features(n, 12, 1).astype(np.float64), features(m, 12, 2, shift=0.2).astype(np.float64)
    rng, size = torch.Generator().manual_seed(7), min(n, m)
    kept_x, kept_y = (
        side[torch.randperm(len(side), generator=rng)[:size].numpy()] if len(side) > size else side for side in (x, y)
    )
    costs = []
    for u in directions_of(20, 12, rng):
        on_x, on_y = sorted(kept_x @ u), sorted(kept_y @ u)
        costs.append(np.mean([abs(a - b) ** order for a, b in zip(on_x, on_y, strict=True)]))
    for block in (neighbours.BLOCK_VALUES, 128):
        monkeypatch.setattr(neighbours, "BLOCK_VALUES", block)
        ours = mind(x, y, projections=20, seed=7, order=order)
        assert ours == pytest.approx(3 * 12 * np.mean(costs), rel=1e-9)


def test_mind_along_one_dimension_is_the_area_between_the_distribution_functions():
    """There, every direction is 1 or -1, and the transport cost of order 1 is that area."""
    x, y = features(60, 1, 1).astype(np.float64), features(60, 1, 2, shift=0.4).astype(np.float64)
    points = np.sort(np.concatenate([x, y]), axis=None)
    below = [np.searchsorted(np.sort(side, axis=None), points[:-1], side="right") / 60 for side in (x, y)]
    area = (np.abs(below[0] - below[1]) * np.diff(points)).sum()
    assert mind(x, y, projections=5, order=1.0) == pytest.approx(3 * area)


def test_mind_of_a_shift_is_three_times_its_square():
    x, shift = features(40, 24, 1).astype(np.float64), np.linspace(-0.5, 1, 24)
    assert mind(x, x) == 0.0
    # The mean of (u.c)^2 over directions is |c|^2 / D.
    assert mind(x, x + shift, projections=20_000) == pytest.approx(3 * (shift**2).sum(), rel=0.05)


def test_the_median_distance_is_that_of_evenly_spaced_rows():
    from scipy.spatial.distance import pdist

    features = np.random.default_rng(0).normal(size=(2500, 6)).astype(np.float32)
    chosen = features[(np.arange(1000) * 2500) // 1000]
    assert median_distance(features) == pytest.approx(np.median(pdist(chosen)), rel=1e-6)
    assert median_distance(features[:30]) == pytest.approx(np.median(pdist(features[:30])), rel=1e-6)
    with pytest.raises(ValueError, match="5 samples whose median distance is 0"):
        median_distance(np.zeros((5, 3)))


@pytest.mark.parametrize("columns", [3, 4096])
def test_kernels_of_a_set_with_itself_are_those_of_all_pairs(monkeypatch, columns):
    from evaluation import metrics, neighbours

    x, y = (np.random.default_rng(seed).normal(size=(40, 5)) for seed in (0, 1))
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(axis=2) / 8)
    across = np.exp(-((x[:, None] - y[None]) ** 2).sum(axis=2) / 8)
    other = np.exp(-((y[:, None] - y[None]) ** 2).sum(axis=2) / 8)
    monkeypatch.setattr(metrics, "_RBF_COLUMNS", columns)
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", 33)
    assert cmmd(x, y, sigma=2.0, scale=1.0) == pytest.approx(kernel.mean() + other.mean() - 2 * across.mean(), rel=1e-9)
