"""The order of training images: which rows of the data set each global batch holds, as a function of seed and number.

Resuming therefore needs only the number of batches taken so far, and any number of workers sees the same images.

Two kinds of position: a position in the order counts images from the start of training, over all epochs; a position in
the global batch counts them from the start of their batch.
"""

import itertools
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import numpy as np

SHUFFLE_STREAM, DRAW_STREAM, SHARD_STREAM = 0, 1, 2
"""Streams of random numbers, which are part of their seeds: rows in an epoch, an image's draws, shards in an epoch."""


@dataclass(frozen=True)
class WorkerShare:
    """The part of every global batch that one worker computes."""

    rank: int
    num_workers: int
    global_batch_size: int

    def positions(self) -> range:
        """Return this worker's positions in the global batch; if it does not divide, shares differ by one image."""
        first, end = (number * self.global_batch_size // self.num_workers for number in (self.rank, self.rank + 1))
        return range(first, end)


class OrderRecord(TypedDict):
    """What a checkpoint records of an order, besides the seed."""

    kind: Literal["global", "windows"]
    rows: NotRequired[int]
    """Rows of a window; for windows only."""


class EpochOrder:
    """Rows of the data set in an endless sequence of epochs, each a new permutation of all rows."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def describe(self) -> OrderRecord:
        """Return what a checkpoint records of this order."""
        return {"kind": "global"}

    def rows(self, positions: range) -> np.ndarray:
        """Return the rows (int64) at consecutive positions, which may lie in several epochs."""
        rows, done = np.empty(len(positions), np.int64), 0
        while done < len(positions):
            epoch, offset = divmod(positions.start + done, self.num_rows)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self.epoch_rows(epoch)
            of_epoch = self._order[offset : offset + len(positions) - done]
            rows[done : done + len(of_epoch)] = of_epoch
            done += len(of_epoch)
        return rows

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return all rows in the order of an epoch."""
        return np.random.default_rng((self.seed, SHUFFLE_STREAM, epoch)).permutation(self.num_rows)


class WindowOrder(EpochOrder):
    """An order for data that are read shard by shard: it shuffles the shards, and the rows of a few shards together.

    An epoch goes through windows: consecutive shuffled shards that together hold at least `window_rows` rows. While a
    window is used, no shard outside it is needed.
    """

    def __init__(self, shard_rows: list[int], window_rows: int, seed: int):
        """shard_rows: number of rows of each shard of the data set, in order."""
        super().__init__(sum(shard_rows), seed)
        self.shard_rows, self.window_rows = shard_rows, window_rows
        self.starts = np.cumsum([0, *shard_rows])
        self._windows: dict[int, list[list[int]]] = {}

    def describe(self) -> OrderRecord:
        return {"kind": "windows", "rows": self.window_rows}

    def windows(self, epoch: int) -> list[list[int]]:
        """Return the windows of an epoch, each a list of shard numbers."""
        if epoch not in self._windows:
            self._windows = {kept: plan for kept, plan in self._windows.items() if abs(kept - epoch) == 1}
            self._windows[epoch] = self._plan_windows(epoch)
        return self._windows[epoch]

    def _plan_windows(self, epoch: int) -> list[list[int]]:
        shards = np.random.default_rng((self.seed, SHARD_STREAM, epoch)).permutation(len(self.shard_rows)).tolist()
        windows: list[list[int]] = []
        num_rows = self.window_rows
        for shard in shards:
            if num_rows >= self.window_rows:
                windows.append([])
                num_rows = 0
            windows[-1].append(shard)
            num_rows += self.shard_rows[shard]
        return windows

    def epoch_rows(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, SHUFFLE_STREAM, epoch))
        rows = [np.concatenate([self._rows_of_shard(shard) for shard in window]) for window in self.windows(epoch)]
        return np.concatenate([generator.permutation(window_rows) for window_rows in rows])

    def current_and_next_window(self, position: int) -> tuple[list[int], list[int]]:
        """Return the shards of the window that a position lies in, and those of the following window."""
        epoch, offset = divmod(position, self.num_rows)
        windows = self.windows(epoch)
        ends = itertools.accumulate(sum(self.shard_rows[shard] for shard in window) for window in windows)
        current = next(number for number, end in enumerate(ends) if offset < end)
        following = windows[current + 1] if current + 1 < len(windows) else self.windows(epoch + 1)[0]
        return windows[current], following

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the shard number of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _rows_of_shard(self, shard: int) -> np.ndarray:
        return np.arange(self.starts[shard], self.starts[shard + 1])


def batch_rows(order: EpochOrder, share: WorkerShare, number: int) -> np.ndarray:
    """Return the rows of a worker's share of a global batch. number: of the batch, counted from the start."""
    first = number * share.global_batch_size
    return order.rows(range(first + share.positions().start, first + share.positions().stop))
