"""Statistics of latents that are merged in any order: mean, spread, tails and correlations of their channels."""

from dataclasses import dataclass
from typing import Self

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Sums over all positions of latents, in float64, about the mean of each of C channels.

    They are merged by the formulas of Chan, Golub & LeVeque 1983 and, for the third and fourth powers, of Pebay 2008
    (Sandia report SAND2008-6212, eq. 2.1), which are exact but for rounding.
    """

    n: int
    """Number of positions."""
    mean: Array
    """(C,)."""
    products: Array
    """(C, C): sums of the products of two channels' deviations."""
    cubes: Array
    """(C,): sums of the deviations' third powers."""
    fourths: Array
    """(C,): sums of the deviations' fourth powers."""

    @classmethod
    def of(cls, latents: Array) -> Self:
        """Return the statistics of latents (N, C, h, w) with at least one position."""
        values = np.moveaxis(np.asarray(latents, np.float64), 1, -1).reshape(-1, latents.shape[1])
        # The mean of equal values may differ from them by rounding, which then has a kurtosis and correlations.
        mean = np.where(values.min(axis=0) == values.max(axis=0), values[0], values.mean(axis=0))
        values = values - mean
        squares = values * values
        return cls(
            n=len(values),
            mean=mean,
            products=values.T @ values,
            cubes=(squares * values).sum(axis=0),
            fourths=(squares * squares).sum(axis=0),
        )

    def merge(self, other: Self) -> Self:
        """Return the statistics of all positions of both."""
        a, b, n = self.n, other.n, self.n + other.n
        delta, squares_a, squares_b = other.mean - self.mean, np.diag(self.products), np.diag(other.products)
        cubes = delta**3 * a * b * (a - b) / n**2 + 3 * delta * (a * squares_b - b * squares_a) / n
        fourths = delta**4 * a * b * (a * a - a * b + b * b) / n**3
        fourths += 6 * delta**2 * (a * a * squares_b + b * b * squares_a) / n**2
        fourths += 4 * delta * (a * other.cubes - b * self.cubes) / n
        return type(self)(
            n=n,
            mean=self.mean + delta * (b / n),
            products=self.products + other.products + np.outer(delta, delta) * (a * b / n),
            cubes=self.cubes + other.cubes + cubes,
            fourths=self.fourths + other.fourths + fourths,
        )

    @property
    def std(self) -> Array:
        """(C,): standard deviation of each channel."""
        return np.sqrt(np.diag(self.products) / self.n)

    @property
    def kurtosis(self) -> Array:
        """(C,): excess kurtosis of each channel, 0 for normal numbers and above 0 for longer tails; 0 of a constant."""
        variance = np.diag(self.products) / self.n
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(variance > 0, self.fourths / self.n / variance**2 - 3, 0.0)

    @property
    def correlations(self) -> Array:
        """(C, C): correlations of the channels at one position; 0 with a constant channel."""
        norms = np.sqrt(np.diag(self.products))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.products / np.outer(norms, norms)
        return np.where(np.isfinite(found), found, 0.0)

    def metrics(self) -> dict[str, float]:
        """Return four numbers over all channels: latent_mean, latent_std, latent_kurtosis and latent_correlation.

        Root mean squares over channels of means and standard deviations; the mean excess kurtosis; and the root mean
        square of the correlations of different channels, 0 for a single channel.
        """
        channels = len(self.mean)
        others = self.correlations[~np.eye(channels, dtype=bool)]
        return {
            "latent_mean": float(np.sqrt((self.mean**2).mean())),
            "latent_std": float(np.sqrt((self.std**2).mean())),
            "latent_kurtosis": float(self.kurtosis.mean()),
            "latent_correlation": float(np.sqrt((others**2).mean())) if channels > 1 else 0.0,
        }
