"""Statistics that are updated in batches and merged in any order, so that workers can reduce their own shards."""

from typing import Self

import numpy as np

from raydit.errors import InvalidInput

Array = np.ndarray
IS_SPLITS = 10
"""Parts of the samples, each of which has an Inception Score."""


class FeatureStatistics:
    """Mean and covariance of features of dimension `dim`, kept as (n, mean, M2) in float64.

    M2 is the sum of outer products of differences from the mean. Statistics are merged by the parallel update of Chan,
    Golub & LeVeque 1983, which agrees with a two-pass computation to 1e-12; raw sums or float32 do not.
    """

    def __init__(self, dim: int):
        self.n = 0
        self.mean = np.zeros(dim)
        self._m2 = np.zeros((dim, dim))

    def update(self, features: Array) -> None:
        """Add features (N, dim). Raises InvalidInput if the shape differs or a value is not finite."""
        features = np.asarray(features, dtype=np.float64)
        _check_rows(features, len(self.mean), "features")
        if len(features):
            mean = features.mean(axis=0)
            deviations = features - mean
            self._add(len(features), mean, deviations.T @ deviations)

    def merge(self, other: Self) -> Self:
        """Add the features that `other` has seen, and return self. `other` is not changed."""
        if len(other.mean) != len(self.mean):
            raise InvalidInput(
                f"statistics of {len(other.mean)} features",
                f"{len(self.mean)}",
                "merge only statistics of one extractor",
            )
        self._add(other.n, other.mean, other._m2)
        return self

    def without(self, part: Self) -> Self:
        """Return new statistics without the features of a part that was merged before: the inverse of merge."""
        left = self.n - part.n
        if left < 1:
            raise ValueError(f"Found a part of {part.n} samples, expected fewer than all {self.n} samples.")
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
        """Covariance (dim, dim) with ddof 1, as FID uses it. Raises InvalidInput for fewer than 2 samples."""
        if self.n < 2:
            raise InvalidInput(f"{self.n} samples", "at least 2 for a covariance", "add images")
        return self._m2 / (self.n - 1)


def assign_random_parts(num_samples: int, parts: int, seed: int = 2020) -> Array:
    """Return the part (N,) in [0, parts) of every sample; sizes of parts differ by one sample at most.

    Part i holds entries [i N // parts, (i + 1) N // parts) of the permutation drawn with RandomState(seed), as in
    torch-fidelity's Inception Score. So the part of an index is known before any sample is.
    """
    order = np.random.RandomState(seed).permutation(num_samples)
    part_of = np.empty(num_samples, dtype=np.int64)
    for part in range(parts):
        part_of[order[part * num_samples // parts : (part + 1) * num_samples // parts]] = part
    return part_of


class InceptionScoreSums:
    """Sums for the Inception Score of a known number of samples, whose logits may arrive in any order and batches.

    The split of every index follows from the number of samples (see assign_random_parts). For each split the sum of p
    (K values) and the sum of p log p are kept, and for each index whether it was seen. Source: Salimans et al. 2016
    (arXiv 1606.03498).
    """

    def __init__(self, num_samples: int, num_logits: int, splits: int = IS_SPLITS, seed: int = 2020):
        if num_samples < splits:
            raise InvalidInput(
                f"{num_samples} samples",
                f"at least one for each of {splits} splits",
                "add samples, or lower splits",
            )
        self._split_of = assign_random_parts(num_samples, splits, seed)
        self._seen = np.zeros(num_samples, dtype=bool)
        self._sum_p = np.zeros((splits, num_logits))
        self._sum_p_log_p = np.zeros(splits)

    def __len__(self) -> int:
        """Number of samples that the score is for, seen or not."""
        return len(self._seen)

    def update(self, indices: Array, logits: Array) -> None:
        """Add the logits (M, K) of the samples with these indices (M,).

        Raises ValueError for an index that was added before or is out of range.
        """
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
        """Add the samples that `other` has seen, and return self. Raises ValueError if an index was added to both."""
        if not np.array_equal(other._split_of, self._split_of) or other._sum_p.shape != self._sum_p.shape:
            raise ValueError(
                f"Found sums over {len(other)} samples and {other._sum_p.shape[1]} logits, "
                f"expected {len(self)} and {self._sum_p.shape[1]} with the same splits and seed. "
                "Create all sums with the same arguments."
            )
        self._see(np.flatnonzero(other._seen), int(other._seen.sum()))
        self._sum_p += other._sum_p
        self._sum_p_log_p += other._sum_p_log_p
        return self

    def _see(self, indices: Array, rows: int) -> None:
        """Mark indices as seen, and refuse padding and shards that are counted twice."""
        known = indices[(indices >= 0) & (indices < len(self))]
        if len(known) != rows or len(np.unique(known)) != rows or self._seen[known].any():
            raise ValueError(
                f"Found {rows} rows for indices {_few(indices)}, of which {int(self._seen[known].sum())} were "
                f"added before, expected one row for each index, and only new indices below {len(self)}. Add every "
                "index once."
            )
        self._seen[known] = True

    def score(self) -> tuple[float, float]:
        """Return the mean and standard deviation (ddof 0) over splits of exp(mean KL(p || split mean of p)).

        Raises ValueError if a sample is missing.
        """
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
        raise InvalidInput(
            f"{what} of shape {values.shape}", f"(N, {dim})", "pass the output of the extractor of these statistics"
        )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise InvalidInput(
            f"{len(rows)} of {len(values)} rows of {what} with NaN or infinity (first: row {rows[0]})",
            "finite numbers",
            "look at these images: the model may have diverged",
        )
