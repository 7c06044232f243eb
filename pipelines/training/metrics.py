"""What is watched while training, beside the loss: where along the noise it falls, and how well devices are used."""

import resource

import torch
from torch import Tensor

QUARTILES = 4


def quartile_sums(losses: Tensor, t: Tensor, end: float) -> dict[str, Tensor]:
    """Sum and number of the losses (n,) whose timestep t (n,), of those in [0, end], falls in each quarter.

    Sums and counts add up over micro-batches, steps and workers; means do not. `add_quartile_losses` divides them.
    """
    quarter = (t.float() * (QUARTILES / end)).long().clamp(max=QUARTILES - 1)
    members = torch.nn.functional.one_hot(quarter, QUARTILES).to(losses.dtype)
    sums, counts = losses.detach() @ members, members.sum(0)
    return {
        f"{kind}_{q + 1}": values[q] for kind, values in (("sum", sums), ("count", counts)) for q in range(QUARTILES)
    }


def add_quartile_losses(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with "loss_quartile_1" (the smallest timesteps) to "_4" for the sums that they were made of."""
    metrics = dict(metrics)
    for q in range(1, QUARTILES + 1):
        total, count = metrics.pop(f"sum_{q}"), metrics.pop(f"count_{q}")
        if count:  # a few small batches may hold no such timestep
            metrics[f"loss_quartile_{q}"] = total / count
    return metrics


def memory_gib(device: torch.device) -> float:
    """Most memory that this process had so far, in GiB: of the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
