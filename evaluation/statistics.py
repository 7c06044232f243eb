"""Sums that stream and merge: shards are reduced where they are, and merge in any order to one result."""

from collections.abc import Mapping
from typing import Self

import numpy as np

Array = np.ndarray


class FeatureStatistics:
    """Mean and covariance of features of dimension `dim`, as (n, mean, M2) in float64.

    M2 is the sum of outer products of deviations from the mean. Parts merge by the parallel update of
    Chan, Golub & LeVeque 1983, which agrees with two passes to 1e-12; raw sums or float32 do not.
    """

    def __init__(self, dim: int):
        self.n = 0
        self.mean = np.zeros(dim)
        self._m2 = np.zeros((dim, dim))

    def update(self, features: Array) -> None:
        """Add features (N, dim). Raises ValueError if the shape differs or a value is not finite."""
        features = np.asarray(features, dtype=np.float64)
        _check_rows(features, len(self.mean), "features")
        if len(features):
            mean = features.mean(axis=0)
            deviations = features - mean
            self._add(len(features), mean, deviations.T @ deviations)

    def merge(self, other: Self) -> Self:
        """Add everything that `other` has seen, and return self. `other` is left as it is."""
        if len(other.mean) != len(self.mean):
            raise ValueError(
                f"Found statistics of {len(other.mean)} features, expected {len(self.mean)}. "
                "Merge only parts that were made with one extractor."
            )
        self._add(other.n, other.mean, other._m2)
        return self

    def _add(self, n: int, mean: Array, m2: Array) -> None:
        if n == 0:
            return
        total = self.n + n
        delta = mean - self.mean
        self._m2 += m2 + np.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def cov(self) -> Array:
        """Covariance (dim, dim) with ddof 1, as FID takes it."""
        if self.n < 2:
            raise ValueError(f"Found {self.n} samples; a covariance needs at least 2. Add more images.")
        return self._m2 / (self.n - 1)

    def to_arrays(self) -> dict[str, Array]:
        """The state as named arrays, for storage."""
        return {"n": np.array(self.n), "mean": self.mean, "m2": self._m2}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """The inverse of to_arrays."""
        statistics = cls(len(arrays["mean"]))
        statistics._add(int(arrays["n"]), arrays["mean"], arrays["m2"])
        return statistics


class InceptionScoreSums:
    """Inception Score of a known number of samples whose logits arrive in any order and any parts.

    Knowing N, the split of every index is known in advance: chunk i = [i N // splits, (i + 1) N // splits)
    of the permutation drawn with RandomState(seed). Of each split are kept the number of samples, the sum
    of p (K values) and the sum of p log p. Source: Salimans et al. 2016 (arXiv 1606.03498); chunks as in
    torch-fidelity.
    """

    def __init__(self, num_samples: int, num_logits: int, splits: int = 10, seed: int = 2020):
        if num_samples < splits:
            raise ValueError(
                f"Found {num_samples} samples, expected at least one for each of {splits} splits. "
                "Add samples, or lower splits."
            )
        order = np.random.RandomState(seed).permutation(num_samples)
        bounds = [i * num_samples // splits for i in range(splits + 1)]
        self._split_of = np.empty(num_samples, dtype=np.int64)
        for split in range(splits):
            self._split_of[order[bounds[split] : bounds[split + 1]]] = split
        self._expected = np.diff(bounds)
        self._count = np.zeros(splits, dtype=np.int64)
        self._sum_p = np.zeros((splits, num_logits))
        self._sum_p_log_p = np.zeros(splits)

    def update(self, indices: Array, logits: Array) -> None:
        """Add the logits (M, K) of the samples with these indices (M,); each index exactly once overall."""
        logits = np.asarray(logits)
        _check_rows(logits, self._sum_p.shape[1], "logits")
        splits = self._split_of[np.asarray(indices)]
        for split in np.unique(splits):
            log_p = _log_softmax(logits[splits == split].astype(np.float64))
            p = np.exp(log_p)
            self._count[split] += len(p)
            self._sum_p[split] += p.sum(axis=0)
            self._sum_p_log_p[split] += (p * log_p).sum()

    def merge(self, other: Self) -> Self:
        """Add everything that `other` has seen, and return self."""
        if not np.array_equal(other._split_of, self._split_of) or other._sum_p.shape != self._sum_p.shape:
            raise ValueError(
                f"Found sums over {len(other._split_of)} samples and {other._sum_p.shape[1]} logits, "
                f"expected {len(self._split_of)} and {self._sum_p.shape[1]} with the same splits and seed. "
                "Make every part with the same arguments."
            )
        self._count += other._count
        self._sum_p += other._sum_p
        self._sum_p_log_p += other._sum_p_log_p
        return self

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation (ddof 0) over splits of exp(mean KL(p || split mean of p))."""
        if not np.array_equal(self._count, self._expected):
            raise ValueError(
                f"Found {self._count.sum()} samples ({self._count.tolist()} per split), expected "
                f"{self._expected.sum()} ({self._expected.tolist()}). Add every index exactly once."
            )
        q = self._sum_p / self._count[:, None]
        q_log_q = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0)), 0.0).sum(axis=1)
        scores = np.exp(self._sum_p_log_p / self._count - q_log_q)
        return float(scores.mean()), float(scores.std())


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _check_rows(values: Array, dim: int, what: str) -> None:
    if values.ndim != 2 or values.shape[1] != dim:
        raise ValueError(
            f"Found {what} of shape {values.shape}, expected (N, {dim}). "
            "Pass rows of the extractor that these statistics were made for."
        )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(
            f"Found {len(rows)} of {len(values)} rows of {what} with NaN or infinity (first: row {rows[0]}), "
            "expected finite numbers. Look at those images: the model may have diverged."
        )
