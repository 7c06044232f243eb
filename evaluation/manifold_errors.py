"""Precision, recall, density and coverage, and their values with each block of generated samples left out (jackknife).

One pass over the distances serves all blocks: the balls around real samples do not depend on the generated ones, and
leaving out a block changes the ball of a generated sample only if one of its nearest neighbours is in that block.
"""

from typing import NamedTuple

import numpy as np

from evaluation.metrics import ManifoldScores, check_neighbours
from evaluation.neighbours import iterate_squared_distances, squared_radii

Array = np.ndarray

_SPARE = 16
"""Neighbours that are looked at beyond the k-th: enough unless nearly all nearest ones are in one block."""


class ManifoldEstimates(NamedTuple):
    """The scores of all generated samples, and those without each block of them."""

    scores: ManifoldScores
    left_out: dict[str, Array]
    """By field of the scores, an array (K,): the values without block 0, 1, ..."""


def manifold_estimates(
    generated: Array, real: Array, block_of: Array, k: int = 3, k_density: int = 5
) -> ManifoldEstimates:
    """Return evaluation.metrics.manifold_scores of all samples, and of all but those of each block.

    generated: (N, D), real: (M, D). block_of: (N,) the block in [0, K) of each generated sample. The estimates without
    a block equal the scores of the other samples, against the same real ones. Raises the same errors as
    manifold_scores.
    """
    check_neighbours(generated, real, k, k_density)
    blocks = int(block_of.max()) + 1
    sizes = np.bincount(block_of, minlength=blocks)
    real_radii, real_radii_density = squared_radii(real, (k, k_density))
    radii = _radii_without_each(generated, block_of, blocks, k)
    precise, balls = np.zeros(blocks, dtype=np.int64), np.zeros(blocks, dtype=np.int64)
    covered = np.zeros((blocks, len(real)), dtype=bool)  # by the samples of each block
    recalled = np.zeros((blocks, len(real)), dtype=bool)
    recalled_without = np.zeros((blocks, len(real)), dtype=bool)  # by balls that are larger without this block
    for rows, distances in iterate_squared_distances(generated, real):
        inside = distances <= real_radii_density
        is_precise, in_balls = (distances <= real_radii).any(axis=1), inside.sum(axis=1)
        in_own = distances <= radii.all[rows, None]
        for block in range(blocks):
            own = block_of[rows] == block
            precise[block] += int(is_precise[own].sum())
            balls[block] += int(in_balls[own].sum())
            covered[block] |= inside[own].any(axis=0)
            recalled[block] |= in_own[own].any(axis=0)
            grown = np.flatnonzero(~own & (radii.without[block, rows] > radii.all[rows]))
            recalled_without[block] |= (distances[grown] <= radii.without[block, rows][grown, None]).any(axis=0)
    n, left = len(generated), len(generated) - sizes
    rest = [np.arange(blocks) != block for block in range(blocks)]
    recall_left = [recalled[other].any(axis=0) | recalled_without[block] for block, other in enumerate(rest)]
    return ManifoldEstimates(
        ManifoldScores(
            int(precise.sum()) / n,
            float(recalled.any(axis=0).mean()),
            int(balls.sum()) / (k_density * n),
            float(covered.any(axis=0).mean()),
        ),
        {
            "precision": (precise.sum() - precise) / left,
            "recall": np.array([each.mean() for each in recall_left]),
            "density": (balls.sum() - balls) / (k_density * left),
            "coverage": np.array([covered[other].any(axis=0).mean() for other in rest]),
        },
    )


class _Radii(NamedTuple):
    """Squared distances of samples to their k-th nearest neighbour."""

    all: Array
    """(N,) among all samples."""
    without: Array
    """(K, N) among the samples that are not in each block."""


def _radii_without_each(samples: Array, block_of: Array, blocks: int, k: int) -> _Radii:
    """Return the radii of the balls around samples (N, D), with all samples and without each block."""
    whole, without = np.empty(len(samples)), np.empty((blocks, len(samples)))
    kept = min(k + 1 + _SPARE, len(samples))
    for rows, distances in iterate_squared_distances(samples, samples):
        nearest = np.argpartition(distances, kept - 1, axis=1)[:, :kept] if kept < len(samples) else None
        near = distances if nearest is None else np.take_along_axis(distances, nearest, axis=1)
        owners = np.broadcast_to(block_of, near.shape) if nearest is None else block_of[nearest]
        whole[rows] = np.partition(near, k, axis=1)[:, k]  # index 0 is the sample itself
        for block in range(blocks):
            others = np.where(owners == block, np.inf, near)
            # A sample that is itself in the block has no ball without it, and its radius is not used.
            radii = np.partition(others, k, axis=1)[:, k]
            unknown = np.flatnonzero(np.isinf(radii) & (block_of[rows] != block))
            if len(unknown):
                all_others = np.where(block_of == block, np.inf, distances[unknown])
                radii[unknown] = np.partition(all_others, k, axis=1)[:, k]
            without[block, rows] = radii
    return _Radii(whole, without)
