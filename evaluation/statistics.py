"""Sums that stream and merge: shards are reduced where they are, and merge in any order to one result."""

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

    def without(self, part: Self) -> Self:
        """What is left when a part is taken out again: the inverse of merge, as new statistics."""
        left = self.n - part.n
        if left < 1:
            raise ValueError(f"Found a part of {part.n} samples, expected fewer than the {self.n} it is taken from.")
        rest = type(self)(len(self.mean))
        rest.n = left
        rest.mean = self.mean + (self.mean - part.mean) * (part.n / left)
        delta = part.mean - rest.mean
        rest._m2 = self._m2 - part._m2
        rest._m2 -= np.outer(delta * (left * part.n / self.n), delta)
        return rest

    def _add(self, n: int, mean: Array, m2: Array) -> None:
        if n == 0:
            return
        total = self.n + n
        delta = mean - self.mean
        self._m2 += m2
        self._m2 += np.outer(delta * (self.n * n / total), delta)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def cov(self) -> Array:
        """Covariance (dim, dim) with ddof 1, as FID takes it."""
        if self.n < 2:
            raise ValueError(f"Found {self.n} samples; a covariance needs at least 2. Add more images.")
        return self._m2 / (self.n - 1)


def random_parts(num_samples: int, parts: int, seed: int = 2020) -> Array:
    """The part (N,) in [0, parts) of every sample: chunks of a permutation, equal in size to within one sample.

    Part i holds entries [i N // parts, (i + 1) N // parts) of the permutation drawn with RandomState(seed), as in
    torch-fidelity's Inception Score; so the part of an index is known before any sample is.
    """
    order = np.random.RandomState(seed).permutation(num_samples)
    part_of = np.empty(num_samples, dtype=np.int64)
    for part in range(parts):
        part_of[order[part * num_samples // parts : (part + 1) * num_samples // parts]] = part
    return part_of


class InceptionScoreSums:
    """Inception Score of a known number of samples whose logits arrive in any order and any parts.

    Knowing N, the split of every index is known in advance (see random_parts). Of each split are kept the sum of p
    (K values) and the sum of p log p; and of each index, whether it was seen. Source: Salimans et al. 2016
    (arXiv 1606.03498).
    """

    def __init__(self, num_samples: int, num_logits: int, splits: int = 10, seed: int = 2020):
        if num_samples < splits:
            raise ValueError(
                f"Found {num_samples} samples, expected at least one for each of {splits} splits. "
                "Add samples, or lower splits."
            )
        self._split_of = random_parts(num_samples, splits, seed)
        self._seen = np.zeros(num_samples, dtype=bool)
        self._sum_p = np.zeros((splits, num_logits))
        self._sum_p_log_p = np.zeros(splits)

    def __len__(self) -> int:
        """Samples that the score is of, seen or not."""
        return len(self._seen)

    def update(self, indices: Array, logits: Array) -> None:
        """Add the logits (M, K) of the samples with these indices (M,); each index exactly once overall."""
        indices, logits = np.asarray(indices), np.asarray(logits)
        _check_rows(logits, self._sum_p.shape[1], "logits")
        self._see(indices, len(logits))
        splits = self._split_of[indices]
        for split in np.unique(splits):
            log_p = _log_softmax(logits[splits == split].astype(np.float64))
            p = np.exp(log_p)
            self._sum_p[split] += p.sum(axis=0)
            self._sum_p_log_p[split] += (p * log_p).sum()

    def merge(self, other: Self) -> Self:
        """Add everything that `other` has seen, and return self."""
        if not np.array_equal(other._split_of, self._split_of) or other._sum_p.shape != self._sum_p.shape:
            raise ValueError(
                f"Found sums over {len(other)} samples and {other._sum_p.shape[1]} logits, "
                f"expected {len(self)} and {self._sum_p.shape[1]} with the same splits and seed. "
                "Make every part with the same arguments."
            )
        self._see(np.flatnonzero(other._seen), int(other._seen.sum()))
        self._sum_p += other._sum_p
        self._sum_p_log_p += other._sum_p_log_p
        return self

    def _see(self, indices: Array, rows: int) -> None:
        """Padding, or a shard counted twice, must not go unnoticed."""
        known = indices[(indices >= 0) & (indices < len(self))]
        if len(known) != rows or len(np.unique(known)) != rows or self._seen[known].any():
            raise ValueError(
                f"Found {rows} rows for indices {_few(indices)}, of which {int(self._seen[known].sum())} had come "
                f"before, expected a row for each of some new indices below {len(self)}. Add every index once."
            )
        self._seen[known] = True

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation (ddof 0) over splits of exp(mean KL(p || split mean of p))."""
        if not self._seen.all():
            raise ValueError(
                f"Found {self._seen.sum()} samples (first missing: {np.flatnonzero(~self._seen)[0]}), expected "
                f"{len(self)}. Add every index exactly once."
            )
        count = np.bincount(self._split_of)
        q = self._sum_p / count[:, None]
        q_log_q = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0)), 0.0).sum(axis=1)
        scores = np.exp(self._sum_p_log_p / count - q_log_q)
        return float(scores.mean()), float(scores.std())


def _few(indices: Array) -> str:
    return f"{indices[:3].tolist()}..." if len(indices) > 3 else str(indices.tolist())


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
