"""Distances between two sets of features, in blocks: 50,000 by 50,000 are never held at once."""

from collections.abc import Iterator

import numpy as np

Array = np.ndarray

BLOCK_VALUES = 2**24
"""Distances or kernel values held at once: 128 MiB of float64."""


def blocks_of_squared_distances(points: Array, centres: Array) -> Iterator[tuple[slice, Array]]:
    """Rows of points (N, D), and their squared Euclidean distances (rows, M) to all centres (M, D).

    In float64 whatever the features are, as |x|^2 + |y|^2 - 2 x.y; only blocks of either side are widened. What
    differs by no more than the rounding of that sum is equal: a copy of a point is at distance 0.
    """
    norms, centre_norms = squared_norms(points), squared_norms(centres)
    rounding = np.finfo(np.float64).eps * points.shape[1]
    for rows in row_blocks(len(points), len(centres)):
        block = points[rows].astype(np.float64)
        distances = np.empty((len(block), len(centres)))
        for columns in row_blocks(len(centres), centres.shape[1]):
            scale = norms[rows, None] + centre_norms[columns]
            part = scale - 2 * (block @ centres[columns].astype(np.float64).T)
            part[part < rounding * scale] = 0.0
            distances[:, columns] = part
        yield rows, distances


def squared_radii(centres: Array, neighbours: tuple[int, ...]) -> Array:
    """Squared distances (len(neighbours), M) of every centre to its k-th nearest other one, for every k."""
    radii = np.empty((len(neighbours), len(centres)))
    for rows, distances in blocks_of_squared_distances(centres, centres):
        # Position 0 is the centre itself.
        radii[:, rows] = np.partition(distances, neighbours, axis=1)[:, neighbours].T
    return radii


def nearest(points: Array, centres: Array, count: int = 1) -> tuple[Array, Array]:
    """The `count` nearest centres of every point: their indices (N, count) and distances (N, count), nearest first.

    To see whether samples are copies: points are features of samples, centres those of the training images.
    Raises ValueError if there are fewer centres.
    """
    if len(centres) < count:
        raise ValueError(f"Found {len(centres)} centres, expected at least count = {count}. Add some, or lower count.")
    indices, found = np.empty((len(points), count), dtype=np.int64), np.empty((len(points), count))
    for rows, squared in blocks_of_squared_distances(points, centres):
        indices[rows] = np.argsort(squared, axis=1, kind="stable")[:, :count]
        found[rows] = np.sqrt(np.take_along_axis(squared, indices[rows], axis=1))
    return indices, found


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices of rows such that a block of the (rows, columns) matrix stays below BLOCK_VALUES."""
    step = max(1, BLOCK_VALUES // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def squared_norms(features: Array) -> Array:
    """(N, D) -> (N,) float64."""
    blocks = row_blocks(len(features), features.shape[1])
    return np.concatenate([(features[rows].astype(np.float64) ** 2).sum(axis=1) for rows in blocks])
