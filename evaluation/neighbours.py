"""Distances between two sets of features, computed in blocks: 50,000 by 50,000 are never held at once."""

from collections.abc import Iterator

import numpy as np

from raydit.errors import InvalidInput

Array = np.ndarray

BLOCK_VALUES = 2**24
"""Number of distances or kernel values that are held at once: 128 MiB of float64."""


def iterate_squared_distances(points: Array, centres: Array) -> Iterator[tuple[slice, Array]]:
    """Yield slices of points (N, D) with their squared Euclidean distances (rows, M) to all centres (M, D).

    Distances are |x|^2 + |y|^2 - 2 x.y in float64, whatever the dtype of the features; only blocks of either side are
    converted. Distances below the rounding error of that sum are 0, so that a copy of a point is at distance 0.
    """
    norms, centre_norms = squared_norms(points), squared_norms(centres)
    rounding = np.finfo(np.float64).eps * points.shape[1]
    for rows in split_rows(len(points), len(centres)):
        block = points[rows].astype(np.float64)
        distances = np.empty((len(block), len(centres)))
        for columns in split_rows(len(centres), centres.shape[1]):
            scale = norms[rows, None] + centre_norms[columns]
            part = scale - 2 * (block @ centres[columns].astype(np.float64).T)
            part[part < rounding * scale] = 0.0
            distances[:, columns] = part
        yield rows, distances


def squared_radii(centres: Array, neighbours: tuple[int, ...]) -> Array:
    """Return squared distances (len(neighbours), M) of every centre to its k-th nearest neighbour, for every k."""
    radii = np.empty((len(neighbours), len(centres)))
    for rows, distances in iterate_squared_distances(centres, centres):
        # Index 0 is the centre itself.
        radii[:, rows] = np.partition(distances, neighbours, axis=1)[:, neighbours].T
    return radii


def find_nearest(points: Array, centres: Array, count: int = 1) -> tuple[Array, Array]:
    """Return indices (N, count) and distances (N, count) of the nearest centres (M, D) of every point (N, D), in order.

    With points from samples and centres from training images, copies of training images show as small distances.
    Raises InvalidInput for fewer than `count` centres.
    """
    if len(centres) < count:
        raise InvalidInput(f"{len(centres)} centres", f"at least count = {count}", "add centres, or lower count")
    indices, found = np.empty((len(points), count), dtype=np.int64), np.empty((len(points), count))
    for rows, squared in iterate_squared_distances(points, centres):
        indices[rows] = np.argsort(squared, axis=1, kind="stable")[:, :count]
        found[rows] = np.sqrt(np.take_along_axis(squared, indices[rows], axis=1))
    return indices, found


def split_rows(rows: int, columns: int) -> list[slice]:
    """Split the rows of a (rows, columns) matrix into slices with at most BLOCK_VALUES values each."""
    step = max(1, BLOCK_VALUES // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def squared_norms(features: Array) -> Array:
    """Return the squared Euclidean norms (N,) of features (N, D) in float64."""
    blocks = split_rows(len(features), features.shape[1])
    return np.concatenate([(features[rows].astype(np.float64) ** 2).sum(axis=1) for rows in blocks])
