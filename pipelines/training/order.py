"""Which images a training step sees: a function of (seed, step, position in the global batch), not of ranks.

Resuming therefore needs the number of batches taken alone, and any number of workers sees the same images.
"""

import itertools
from dataclasses import dataclass

import numpy as np

SHUFFLE, DRAWS, SHARDS = 0, 1, 2
"""Streams of random numbers that must not share a seed."""


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one worker computes."""

    rank: int
    num_workers: int
    global_batch_size: int

    def positions(self) -> range:
        """Positions of this worker's images in the global batch; shares differ by one where it does not divide."""
        first, end = (number * self.global_batch_size // self.num_workers for number in (self.rank, self.rank + 1))
        return range(first, end)


class EpochOrder:
    """Row of the data set at each place of the endless sequence of epochs, each epoch shuffled anew."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def describe(self) -> dict:
        """What of it a checkpoint records, beside the seed."""
        return {"kind": "global"}

    def rows(self, places: range) -> np.ndarray:
        """Rows (int64) at consecutive places; an epoch's end may fall between them."""
        return np.array([self._row(place) for place in places], np.int64)

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.epoch(epoch)
        return self._order[offset]

    def epoch(self, epoch: int) -> np.ndarray:
        """All rows, as one epoch sees them."""
        return np.random.default_rng((self.seed, SHUFFLE, epoch)).permutation(self.num_rows)


class WindowOrder(EpochOrder):
    """An order for data that are read shard by shard: shards shuffled, and rows among those of a few shards.

    An epoch goes through windows of consecutive shuffled shards that hold at least `window_rows` rows together.
    While one window is used, no other shard is needed.
    """

    def __init__(self, shard_rows: list[int], window_rows: int, seed: int):
        """shard_rows: rows of each shard of the data set, in order."""
        super().__init__(sum(shard_rows), seed)
        self.shard_rows, self.window_rows = shard_rows, window_rows
        self.starts = np.cumsum([0, *shard_rows])
        self._windows: dict[int, list[list[int]]] = {}

    def describe(self) -> dict:
        return {"kind": "windows", "rows": self.window_rows}

    def windows(self, epoch: int) -> list[list[int]]:
        """Numbers of the shards of every window of an epoch."""
        if epoch not in self._windows:
            self._windows = {kept: plan for kept, plan in self._windows.items() if abs(kept - epoch) == 1}
            self._windows[epoch] = self._plan(epoch)
        return self._windows[epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        windows: list[list[int]] = []
        held = self.window_rows
        for shard in np.random.default_rng((self.seed, SHARDS, epoch)).permutation(len(self.shard_rows)).tolist():
            if held >= self.window_rows:
                windows.append([])
                held = 0
            windows[-1].append(shard)
            held += self.shard_rows[shard]
        return windows

    def epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, SHUFFLE, epoch))
        rows = [np.concatenate([self._rows_of(shard) for shard in window]) for window in self.windows(epoch)]
        return np.concatenate([generator.permutation(part) for part in rows])

    def windows_from(self, place: int) -> tuple[list[int], list[int]]:
        """Shards of the window of a place, and of the window that follows it."""
        epoch, offset = divmod(place, self.num_rows)
        windows = self.windows(epoch)
        ends = itertools.accumulate(sum(self.shard_rows[shard] for shard in window) for window in windows)
        current = next(number for number, end in enumerate(ends) if offset < end)
        following = windows[current + 1] if current + 1 < len(windows) else self.windows(epoch + 1)[0]
        return windows[current], following

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the shard of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _rows_of(self, shard: int) -> np.ndarray:
        return np.arange(self.starts[shard], self.starts[shard + 1])


def step_rows(order: EpochOrder, share: Share, step: int) -> np.ndarray:
    """Rows that this worker sees in the batch number `step`."""
    first = step * share.global_batch_size
    return order.rows(range(first + share.positions().start, first + share.positions().stop))
