"""Per-channel mean and standard deviation of latents, from sums that are recorded for each shard."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChannelSums:
    """Per-channel sums over the positions of some posteriors; they add up over shards. JSON keys are the fields."""

    sum: list[float]
    """Sum of the means, (C,)."""
    sum_squares: list[float]
    """Sum of the second moments (squared mean plus variance), (C,)."""
    count: int
    """Number of positions: N H W."""


def channel_sums(moments: np.ndarray, *, deterministic: bool = False) -> ChannelSums:
    """Return the sums in float64 for moments (N, 2C, H, W), or (N, C, H, W) if their posterior is deterministic.

    Log variances are clipped to [-30, 20]; a deterministic posterior has no variance.
    """
    axes = (0, 2, 3)
    if deterministic:
        mean = moments.astype(np.float64)
        second_moment = mean**2
    else:
        mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
        second_moment = mean**2 + np.exp(np.clip(log_variance, -30.0, 20.0))
    return ChannelSums(
        sum=mean.sum(axes).tolist(),
        sum_squares=second_moment.sum(axes).tolist(),
        count=int(moments.shape[0] * np.prod(moments.shape[2:])),
    )


def channel_statistics(sums: Sequence[ChannelSums]) -> dict[str, list[float]]:
    """Return mean and standard deviation, (C,) each, of unscaled latents drawn from the posteriors.

    The keys "latents_mean" and "latents_std" are those of the manifest; the lists are empty if there are no latents.
    """
    sums = [entry for entry in sums if entry.count]
    if not sums:
        return {"latents_mean": [], "latents_std": []}
    count = sum(entry.count for entry in sums)
    mean = np.sum([entry.sum for entry in sums], axis=0) / count
    square = np.sum([entry.sum_squares for entry in sums], axis=0) / count
    return {"latents_mean": mean.tolist(), "latents_std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def sums_from_statistics(mean: Sequence[float], std: Sequence[float], count: int) -> ChannelSums:
    """Return the sums, up to rounding, that give some statistics. mean, std: (C,). count: number of positions."""
    means, stds = np.array(mean), np.array(std)
    return ChannelSums(sum=(means * count).tolist(), sum_squares=((stds**2 + means**2) * count).tolist(), count=count)
