"""Evenly spaced images of a listing whose records are read shard by shard, whatever the size of the shards."""

import numpy as np

SPACING_ROWS = 500
"""Images of a listing in which the spacing of those kept begins anew: the shards of recipes for large data sets, whose
references were spaced within each shard when they were made. A longer stride continues across runs: otherwise one image
of each would be kept, however many runs there are."""


class EvenSpacing:
    """Chooses every stride-th readable image of a listing that comes in shards, or of each of its runs.

    Runs have SPACING_ROWS images. A stride above that counts through the listing.
    """

    def __init__(self, stride: int):
        self._stride = stride
        self._start = 0
        """Position in the listing of the next shard's first image."""
        self._run, self._readable = 0, 0
        """The run that the latest readable image lies in, and how many readable images it had so far."""

    def choose(self, readable: np.ndarray, count: int) -> np.ndarray:
        """Return which of the next shard's readable images are kept, as positions among these.

        readable: their positions in the shard, in order. count: number of all images in the shard.
        """
        runs = (self._start + readable) // SPACING_ROWS if self._stride <= SPACING_ROWS else np.zeros_like(readable)
        self._start += count
        if not len(readable):
            return readable
        ranks = np.arange(len(runs)) - np.searchsorted(runs, runs)
        ranks[runs == self._run] += self._readable
        self._run, self._readable = int(runs[-1]), int(ranks[-1]) + 1
        return np.flatnonzero(ranks % self._stride == 0)
