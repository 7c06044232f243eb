"""Metrics: pure functions from arrays of features to scores, computed in float64.

Conventions (subsets, splits, seeds, which side is generated) are those of torch-fidelity 0.4, with which the
tests compare them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from evaluation.neighbours import iterate_squared_distances, split_rows, squared_norms, squared_radii
from evaluation.statistics import IS_SPLITS, InceptionScoreSums
from raydit.errors import InvalidInput

Array = np.ndarray
_RBF_COLUMNS = 2**12
"""Samples that a block of rows is sized for: blocks of 4,096 rows leave few pairs to be computed twice."""
ROUNDING = 8 * np.finfo(np.float64).eps
"""Share of the largest eigenvalue below which the eigenvalues that LAPACK returns are rounding errors."""


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Return the squared Frechet distance of two Gaussians: |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    mean: (D,), cov: (D, D) with ddof 1. Source: Heusel et al. 2017, eq. 6 (arXiv 1706.08500).
    The trace of the root is the sum of the roots of the eigenvalues of the symmetric S^T cov2 S with cov1 = S S^T,
    because sqrtm of the asymmetric product has silently returned wrong values for covariances close to singular.
    Directions of cov1 below 1e-12 of its largest eigenvalue are rounding errors, and dropped. So are eigenvalues below
    the last digits of the largest one: of fewer images than dimensions most are, and their roots would add up to 1e-7.
    Raises InvalidInput if shapes do not match or a value is not finite.
    """
    return frechet_distance_to(mean1, cov1)(mean2, cov2)


def frechet_distance_to(mean1: Array, cov1: Array) -> Callable[[Array, Array], float]:
    """Return frechet_distance with mean1 and cov1 fixed and decomposed once, which halves the time of further calls."""
    mean1, cov1 = np.asarray(mean1, dtype=np.float64), np.asarray(cov1, dtype=np.float64)
    _check_moments(mean1, cov1, mean1, cov1)
    root = _covariance_root(cov1)

    def distance(mean2: Array, cov2: Array) -> float:
        mean2, cov2 = np.asarray(mean2, dtype=np.float64), np.asarray(cov2, dtype=np.float64)
        _check_moments(mean1, cov1, mean2, cov2)
        cross = np.linalg.eigvalsh(root.T @ cov2 @ root)
        squared = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * _trace_of_root(cross)
        return max(0.0, float(squared))  # equal Gaussians would otherwise give about -1e-12

    return distance


def frechet_distance_of(mean1: Array, cov1: Array) -> Callable[[Array], float]:
    """Return the function from features (N, D) to the Frechet distance of their Gaussian from a fixed one.

    It is that of frechet_distance_to with their mean and covariance. Of fewer samples than dimensions, it takes the
    eigenvalues of a matrix (N, N) instead of (D, D).
    """
    mean1, cov1 = np.asarray(mean1, dtype=np.float64), np.asarray(cov1, dtype=np.float64)
    _check_moments(mean1, cov1, mean1, cov1)
    root, trace1 = _covariance_root(cov1), np.trace(cov1)

    def distance_of(features: Array) -> float:
        features = np.asarray(features, dtype=np.float64)
        mean2 = features.mean(axis=0)
        centred = (features - mean2) / np.sqrt(len(features) - 1)
        projected = centred @ root  # (N, R): both products have the same eigenvalues above zero
        few = len(projected) < projected.shape[1]
        cross = np.linalg.eigvalsh(projected @ projected.T if few else projected.T @ projected)
        squared = ((mean1 - mean2) ** 2).sum() + trace1 + (centred**2).sum() - 2 * _trace_of_root(cross)
        return max(0.0, float(squared))

    return distance_of


def _covariance_root(cov: Array) -> Array:
    """Return S (D, R) with cov = S S^T, without directions that are rounding errors."""
    variances, directions = np.linalg.eigh(np.asarray(cov, dtype=np.float64))
    kept = variances > 1e-12 * variances[-1]
    return directions[:, kept] * np.sqrt(variances[kept])


def _trace_of_root(eigenvalues: Array) -> float:
    """Return the sum of the roots of a matrix's eigenvalues, ascending, without those that are rounding errors."""
    if not len(eigenvalues):  # the covariance of equal images has no root with columns
        return 0.0
    return float(np.sqrt(eigenvalues[eigenvalues > ROUNDING * eigenvalues[-1]]).sum())


def inception_score(logits: Array, splits: int = IS_SPLITS, seed: int = 2020) -> tuple[float, float]:
    """Return the Inception Score's mean and standard deviation over splits. logits: (N, K).

    Samples are shuffled first, because splits of samples that are sorted by class would give nonsense.
    Source: Salimans et al. 2016 (arXiv 1606.03498). Raises InvalidInput for fewer samples than splits.
    """
    logits = np.asarray(logits)
    sums = InceptionScoreSums(len(logits), logits.shape[1], splits, seed)
    sums.update(np.arange(len(logits)), logits)
    return sums.score()


def kernel_distance(
    features1: Array, features2: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3: mean and standard deviation over random subsets.

    features1: (N, D) of generated, features2: (M, D) of real images. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    Raises InvalidInput if either side has fewer than subset_size samples.
    """
    x, y = np.asarray(features1), np.asarray(features2)
    if min(len(x), len(y)) < subset_size:
        raise InvalidInput(
            f"{len(x)} and {len(y)} samples",
            f"at least subset_size = {subset_size} on both sides",
            f"add samples, or pass subset_size={min(len(x), len(y))} or less",
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
    """Return for every subset s the sum of k(x_i, y_j) over i in of_x[s] and j in of_y[s]. of_x, of_y: (S, M)."""
    subsets, size = of_x.shape
    if len(x) * len(y) > subsets * size**2:
        return np.array([_kernel(x[i], y[j]).sum() for i, j in zip(of_x, of_y, strict=True)])
    # In small sets the subsets overlap, so each kernel value is computed once and summed by membership.
    chosen_x, chosen_y = _membership(of_x, len(x)), _membership(of_y, len(y))
    sums = np.zeros(subsets)
    for rows in split_rows(len(x), len(y)):
        sums += ((chosen_x[:, rows] @ _kernel(x[rows], y)) * chosen_y).sum(axis=1)
    return sums


def _diagonal_sums(x: Array, of_x: Array) -> Array:
    """Return for every subset s the sum of k(x_i, x_i) over i in of_x[s]."""
    return (((squared_norms(x) / x.shape[1]) + 1) ** 3)[of_x].sum(axis=1)


def _kernel(x: Array, y: Array) -> Array:
    inner = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return inner * inner * inner  # twice as fast as ** 3


def _membership(of: Array, n: int) -> Array:
    """Convert indices (S, M) below n to ones and zeros (S, n)."""
    chosen = np.zeros((len(of), n))
    np.put_along_axis(chosen, of, 1.0, axis=1)
    return chosen


def cmmd(features1: Array, features2: Array, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Return scale times the biased squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)), diagonals included.

    features1: (N, D), features2: (M, D), used as they are: CMMD's are L2-normalised embeddings of CLIP ViT-L/14 at 336
    pixels. Source: Jayasumana et al. 2024, eq. 3 and section 4 (arXiv 2401.09603). Memory is bounded by blocks.
    """
    x, y = _check_sides(features1, features2, fewest=1)
    within = _rbf_sum(x, x, sigma) / len(x) ** 2 + _rbf_sum(y, y, sigma) / len(y) ** 2
    return scale * (within - 2 * _rbf_sum(x, y, sigma) / (len(x) * len(y)))


def rbf_mmd(features1: Array, features2: Array, sigma: float) -> float:
    """Return the unbiased squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)); it may be below zero.

    features1: (N, D), features2: (M, D). Source: Gretton et al. 2012, eq. 3 ("A kernel two-sample test"). Memory is
    bounded by blocks. Raises InvalidInput if either side has fewer than two samples.
    """
    x, y = _check_sides(features1, features2, fewest=2)
    # The kernel of a sample with itself, which is 1, is left out.
    within = sum((_rbf_sum(side, side, sigma) - len(side)) / (len(side) * (len(side) - 1)) for side in (x, y))
    return within - 2 * _rbf_sum(x, y, sigma) / (len(x) * len(y))


def mind(features1: Array, features2: Array, projections: int = 1000, seed: int = 2020, order: float = 2.0) -> float:
    """Return the Monge Inception Distance: 3 D times the mean of |sort(u.x) - sort(u.y)|^order, u a random direction.

    It estimates the sliced Wasserstein distance to the power `order`, which is 2 in the paper. For a shift of all
    features by c it is about 3 |c|^2.
    features1: (N, D), features2: (M, D); of the larger side a random subset is used. Subset and directions are drawn as
    torch-fidelity draws them. Source: Berthet et al. 2026 (arXiv 2605.06797). Memory is bounded by blocks.
    """
    import torch

    x, y = _check_sides(features1, features2, fewest=1)
    dim, rng = x.shape[1], torch.Generator().manual_seed(seed)
    if len(x) != len(y):
        size = min(len(x), len(y))
        x, y = (
            side[torch.randperm(len(side), generator=rng)[:size].numpy()] if len(side) > size else side
            for side in (x, y)
        )
    directions = torch.randn(projections, dim, generator=rng).double()
    directions = (directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)).numpy()
    total = 0.0
    for rows in split_rows(projections, max(len(x), dim)):
        sorted_x, sorted_y = (np.sort(_project(directions[rows], side), axis=1) for side in (x, y))
        total += float((np.abs(sorted_x - sorted_y) ** order).sum())
    return 3 * dim * total / (projections * len(x))


def _project(directions: Array, features: Array) -> Array:
    """Return features (N, D) projected on directions (M, D), (M, N) float64; only blocks of features are converted."""
    projected = np.empty((len(directions), len(features)))
    for rows in split_rows(len(features), features.shape[1]):
        projected[:, rows] = directions @ features[rows].astype(np.float64).T
    return projected


def _rbf_sum(x: Array, y: Array, sigma: float) -> float:
    """Return the sum of exp(-|x_i - y_j|^2 / (2 sigma^2)) over all pairs; of one set with itself in half the time."""
    if not sigma > 0:
        raise InvalidInput(f"sigma is {sigma}", "a number above 0", "use 10, as CMMD does")
    total = 0.0
    for rows in split_rows(len(x), min(len(y), _RBF_COLUMNS)):
        block = x[rows]
        if x is not y:
            total += _kernel_sum(block, y, sigma)
        else:  # pairs of this block with one another, and twice those with all later samples
            total += _kernel_sum(block, block, sigma) + 2 * _kernel_sum(block, x[rows.stop :], sigma)
    return total


def _kernel_sum(x: Array, y: Array, sigma: float) -> float:
    if not len(y):
        return 0.0
    blocks = iterate_squared_distances(x, y)
    return float(sum(np.exp(distances / (-2 * sigma**2)).sum() for _, distances in blocks))


def median_distance(features: Array, count: int = 1000) -> float:
    """Return the median distance between `count` evenly spaced rows of features (N, D), or all if there are fewer.

    It is the customary width of a Gaussian kernel (Gretton et al. 2012, section 8). Raises InvalidInput for fewer than
    two rows, or if most are equal.
    """
    chosen = np.asarray(features)[np.arange(min(count, len(features))) * len(features) // min(count, len(features))]
    pairs = np.triu_indices(len(chosen), 1)
    distances = np.concatenate([squared for _, squared in iterate_squared_distances(chosen, chosen)])[pairs]
    median = float(np.sqrt(np.median(distances))) if len(distances) else 0.0
    if not median > 0:
        raise InvalidInput(
            f"{len(chosen)} samples whose median distance is 0",
            "samples that differ from each other",
            "use other samples",
        )
    return median


def _check_sides(features1: Array, features2: Array, fewest: int) -> tuple[Array, Array]:
    x, y = np.asarray(features1), np.asarray(features2)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < fewest:
        raise InvalidInput(
            f"features of shapes {x.shape} and {y.shape}",
            f"(N, D) and (M, D) with one D, and at least {fewest} on each side",
            "use one extractor for both sides, or add samples",
        )
    return x, y


class ManifoldScores(NamedTuple):
    """Overlap of the manifolds of generated and real samples, as fractions except for density."""

    precision: float
    """Share of generated samples inside the real manifold."""
    recall: float
    """Share of real samples inside the generated manifold."""
    density: float
    """Mean number of real balls that contain a generated sample, over k: about 1 for real samples, 0 for outliers."""
    coverage: float
    """Share of real samples whose ball contains a generated sample."""


def manifold_scores(generated: Array, real: Array, k: int = 3, k_density: int = 5) -> ManifoldScores:
    """Return precision and recall with k, density and coverage with k_density neighbours, in one pass over distances.

    generated: (N, D), real: (M, D). A manifold is the union of balls around its samples that reach to their k-th
    nearest neighbour, boundary included. Sources: Kynkaanniemi et al. 2019 (arXiv 1904.06991), k = 3; Naeem et al.
    2020 (arXiv 2002.09797), eq. 3 and 4, k = 5. Distances are held in blocks: 50,000 by 50,000 of 2048 features take
    2 GB. Raises InvalidInput if either side has too few samples.
    """
    check_neighbours(generated, real, k, k_density)
    real_radii, real_radii_density = squared_radii(real, (k, k_density))
    (generated_radii,) = squared_radii(generated, (k,))
    precise, balls = 0, 0
    recalled, covered = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool)
    for rows, distances in iterate_squared_distances(generated, real):
        precise += int((distances <= real_radii).any(axis=1).sum())
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
        inside = distances <= real_radii_density
        balls += int(inside.sum())
        covered |= inside.any(axis=0)
    n = len(generated)
    return ManifoldScores(precise / n, float(recalled.mean()), balls / (k_density * n), float(covered.mean()))


def check_neighbours(generated: Array, real: Array, k: int, k_density: int) -> None:
    """Raise InvalidInput if either side has too few samples for that many nearest neighbours."""
    if min(len(generated), len(real)) <= max(k, k_density):
        raise InvalidInput(
            f"{len(generated)} generated and {len(real)} real samples",
            f"more than k = {max(k, k_density)} of each",
            "add samples, or lower k",
        )


def precision_recall(generated: Array, real: Array, k: int = 3) -> tuple[float, float]:
    """Return precision and recall with k neighbours; see manifold_scores."""
    scores = manifold_scores(generated, real, k, k)
    return scores.precision, scores.recall


def _check_moments(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> None:
    dim = len(mean1)
    if mean2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        raise InvalidInput(
            f"means of shapes {mean1.shape} and {mean2.shape} with covariances of {cov1.shape} and {cov2.shape}",
            "(D,) and (D, D) with one D",
            "use one extractor for both sides",
        )
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise InvalidInput("a mean or covariance with NaN or infinity", "finite numbers", "rebuild the statistics")
