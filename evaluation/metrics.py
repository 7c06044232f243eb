"""The four reductions from features to scores: pure functions over arrays, in float64.

Conventions (subsets, splits, seeds, which side is generated) are those of torch-fidelity 0.4, against which
the tests compare them.
"""

import numpy as np

from evaluation.statistics import InceptionScoreSums

Array = np.ndarray

_BLOCK_VALUES = 2**24
"""Distances or kernel values held at once: 128 MiB of float64."""


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Frechet distance of two Gaussians: |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    mean: (D,), cov: (D, D) with ddof 1. Source: Heusel et al. 2017, eq. 6 (arXiv 1706.08500).
    The trace of the root is the sum of roots of the eigenvalues of the symmetric S^T cov2 S with
    cov1 = S S^T: sqrtm of the unsymmetric product has returned wrong values silently when the covariances
    are close to singular. Directions of cov1 below 1e-12 of its largest eigenvalue are rounding, and dropped.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mean1, cov1, mean2, cov2))
    _check_moments(mean1, cov1, mean2, cov2)
    variances, directions = np.linalg.eigh(cov1)
    kept = variances > 1e-12 * variances[-1]
    root = directions[:, kept] * np.sqrt(variances[kept])
    cross = np.linalg.eigvalsh(root.T @ cov2 @ root)
    trace_root = np.sqrt(cross.clip(min=0)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_root
    return max(0.0, float(distance))  # equal Gaussians would otherwise give about -1e-12


def inception_score(logits: Array, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Inception Score: mean and standard deviation over splits. logits: (N, K).

    Source: Salimans et al. 2016 (arXiv 1606.03498). Samples are shuffled first: unshuffled chunks of
    class-sorted samples give nonsense.
    """
    logits = np.asarray(logits)
    sums = InceptionScoreSums(len(logits), logits.shape[1], splits, seed)
    sums.update(np.arange(len(logits)), logits)
    return sums.score()


def kernel_distance(
    features1: Array, features2: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3: mean and standard deviation over random subsets.

    features: (N, D), generated first. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    Raises ValueError if either side has fewer than subset_size samples.
    """
    x, y = (np.asarray(features, dtype=np.float64) for features in (features1, features2))
    if min(len(x), len(y)) < subset_size:
        raise ValueError(
            f"Found {len(x)} and {len(y)} samples, expected at least subset_size = {subset_size} on both "
            f"sides. Add samples, or pass subset_size={min(len(x), len(y))} or less."
        )
    rng = np.random.RandomState(seed)
    draws = [
        (rng.choice(len(x), subset_size, replace=False), rng.choice(len(y), subset_size, replace=False))
        for _ in range(subsets)
    ]
    of_x, of_y = (np.array(side) for side in zip(*draws, strict=True))
    within = _kernel_sums(x, x, of_x, of_x) - _diagonal_sums(x, of_x)
    within += _kernel_sums(y, y, of_y, of_y) - _diagonal_sums(y, of_y)
    between = _kernel_sums(x, y, of_x, of_y)
    mmd = within / (subset_size * (subset_size - 1)) - 2 * between / subset_size**2
    return float(mmd.mean()), float(mmd.std())


def _kernel_sums(x: Array, y: Array, of_x: Array, of_y: Array) -> Array:
    """For every subset s the sum of k(x_i, y_j) over i in of_x[s], j in of_y[s]. of_x, of_y: (S, M)."""
    subsets, size = of_x.shape
    if len(x) * len(y) > subsets * size**2:
        return np.array([_kernel(x[i], y[j]).sum() for i, j in zip(of_x, of_y, strict=True)])
    # Small sets: subsets overlap, so that each kernel value is computed once and summed by membership.
    chosen_x, chosen_y = _membership(of_x, len(x)), _membership(of_y, len(y))
    sums = np.zeros(subsets)
    for rows in _row_blocks(len(x), len(y)):
        sums += ((chosen_x[:, rows] @ _kernel(x[rows], y)) * chosen_y).sum(axis=1)
    return sums


def _diagonal_sums(x: Array, of_x: Array) -> Array:
    return ((((x**2).sum(axis=1) / x.shape[1]) + 1) ** 3)[of_x].sum(axis=1)


def _kernel(x: Array, y: Array) -> Array:
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner  # twice as fast as ** 3


def _membership(of: Array, n: int) -> Array:
    """(S, M) indices below n -> (S, n) ones and zeros."""
    chosen = np.zeros((len(of), n))
    np.put_along_axis(chosen, of, 1.0, axis=1)
    return chosen


def precision_recall(generated: Array, real: Array, k: int = 3) -> tuple[float, float]:
    """Fraction of generated samples inside the real manifold, and of real ones inside the generated manifold.

    generated: (N, D), real: (M, D). A manifold is the union of balls around its samples that reach to their
    k-th nearest neighbour. Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991).
    """
    generated, real = (np.asarray(features, dtype=np.float64) for features in (generated, real))
    if min(len(generated), len(real)) <= k:
        raise ValueError(
            f"Found {len(generated)} generated and {len(real)} real samples, expected more than k = {k} of "
            "each. Add samples, or lower k."
        )
    precision = _fraction_inside(generated, real, _squared_radii(real, k))
    recall = _fraction_inside(real, generated, _squared_radii(generated, k))
    return precision, recall


def _squared_radii(centres: Array, k: int) -> Array:
    """Squared distance of every sample to its k-th nearest neighbour; the nearest of all is itself."""
    radii = [
        np.partition(_squared_distances(centres[rows], centres), k, axis=1)[:, k]
        for rows in _row_blocks(len(centres), len(centres))
    ]
    return np.concatenate(radii)


def _fraction_inside(points: Array, centres: Array, squared_radii: Array) -> float:
    inside = sum(
        int((_squared_distances(points[rows], centres) <= squared_radii).any(axis=1).sum())
        for rows in _row_blocks(len(points), len(centres))
    )
    return inside / len(points)


def _squared_distances(x: Array, y: Array) -> Array:
    return (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * (x @ y.T)


def _row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices of rows such that a block of the (rows, columns) matrix stays below _BLOCK_VALUES."""
    step = max(1, _BLOCK_VALUES // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _check_moments(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> None:
    dim = len(mean1)
    if mean2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        raise ValueError(
            f"Found means {mean1.shape} and {mean2.shape}, covariances {cov1.shape} and {cov2.shape}; "
            "expected (D,) and (D, D) with one D. Use one extractor for both sides."
        )
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError(
            "Found NaN or infinity in a mean or covariance, expected finite numbers. Rebuild the statistics."
        )
