"""Training metrics besides the loss itself: its quartiles over timesteps, and memory."""

import resource

import numpy as np
import torch
from torch import Tensor

QUARTILES = 4


def quartile_sums(losses: Tensor, t: Tensor, end: float) -> dict[str, Tensor]:
    """Return, for each quarter of the timesteps, the sum and the number of the losses in it.

    losses, t: (n,), with t in [0, end]. The keys are "sum_1" to "sum_4" and "count_1" to "count_4". Unlike means, sums
    and counts add up over micro-batches, steps and workers; `add_quartile_losses` divides them.
    """
    quarter = (t.float() * (QUARTILES / end)).long().clamp(max=QUARTILES - 1)
    members = torch.nn.functional.one_hot(quarter, QUARTILES).to(losses.dtype)
    sums, counts = losses.detach() @ members, members.sum(0)
    return {
        f"{kind}_{q + 1}": values[q] for kind, values in (("sum", sums), ("count", counts)) for q in range(QUARTILES)
    }


def mean_losses(losses: np.ndarray, t: np.ndarray, end: float) -> dict[str, float]:
    """Return the mean of losses (n,), "loss", and their means by quarters of the timesteps, from "loss_quartile_1" on.

    t: (n,) in [0, end]. A quarter without a timestep has no mean.
    """
    values = losses.astype(np.float64)  # NumPy adds up in an order that depends on n alone
    quarter = np.minimum((t.astype(np.float32) * (QUARTILES / end)).astype(np.int64), QUARTILES - 1)
    quartiles = {f"loss_quartile_{q + 1}": values[quarter == q] for q in range(QUARTILES)}
    return {name: float(part.mean()) for name, part in {"loss": values, **quartiles}.items() if len(part)}


def add_quartile_losses(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the sums and counts of `quartile_sums` by their quotients.

    These are "loss_quartile_1" (the smallest timesteps) to "loss_quartile_4"; a quarter without a timestep has none.
    """
    metrics = dict(metrics)
    for q in range(1, QUARTILES + 1):
        total, count = metrics.pop(f"sum_{q}"), metrics.pop(f"count_{q}")
        if count:
            metrics[f"loss_quartile_{q}"] = total / count
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has held so far, in GiB: the GPU's if it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
