"""Any average of the weights after the training, from the power-function averages that checkpoints hold.

Every stored average weighs the course of training by a profile; a sum of profiles that is close to the wanted
one tells how to add up the averages. Source: Karras et al. 2024, section 3.2 and appendix C
(https://arxiv.org/abs/2312.02696).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dit.checkpoint import Checkpoint
from dit.ema import gamma_of


class Profile(NamedTuple):
    """How a power-function average weighs time tau: (gamma + 1) tau^gamma / step^(gamma + 1) up to step, then 0."""

    step: float
    gamma: float


def profile_product(one: Profile, other: Profile) -> float:
    """Inner product of two profiles: the integral of their product over time, in 1 / steps."""
    earlier, later = sorted((one, other))
    gammas = (one.gamma + 1) * (other.gamma + 1) / (one.gamma + other.gamma + 1)
    return gammas * (earlier.step / later.step) ** later.gamma / later.step


def reconstruction_weights(stored: Sequence[Profile], target: Profile) -> Tensor:
    """Weights (len(stored),) float64, of sum 1, by which stored profiles add up to the target as nearly as they can.

    Least squares over time, as in the paper, which leaves the sum to the fit. With the sum held at 1, a parameter
    that did not change comes back exactly, and few snapshots give a nearer average.
    Raises ValueError if the target is later than everything stored.
    """
    newest = max((profile.step for profile in stored), default=0)
    if not 0 < target.step <= newest:
        raise ValueError(
            f"an average at step {target.step:g} was asked for, but there are snapshots up to step {newest:g} only: "
            "choose an earlier step, or give later checkpoints"
        )
    scale = target.step  # in units of the target's time the products are near 1, as the sum's row is
    products = [[scale * profile_product(one, other) for other in stored] for one in stored]
    normal = torch.ones(len(stored) + 1, len(stored) + 1, dtype=torch.float64)  # the last row: the sum
    normal[:-1, :-1] = torch.tensor(products, dtype=torch.float64)
    normal[-1, -1] = 0
    wanted = torch.tensor([scale * profile_product(one, target) for one in stored] + [1.0], dtype=torch.float64)
    # Of equally good weights the smallest: large ones that cancel would multiply the snapshots' rounding.
    return torch.linalg.lstsq(normal, wanted[:, None], driver="gelsd").solution[:-1, 0]


def reconstruct_ema(checkpoints: Sequence[Checkpoint], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """State dict of the average of relative width sigma_rel at `step`, from the averages in checkpoints of one run.

    step: left out, that of the last checkpoint. What is not floating point comes from the last checkpoint.
    Raises ValueError if the checkpoints hold no power-function average, or none as late as `step`.
    """
    files = {
        Profile(checkpoint.step, gamma_of(float(file.stem.removeprefix("ema_")))): file
        for checkpoint in checkpoints
        for file in sorted(checkpoint.path.glob("ema_*.safetensors"))
    }
    if not files:
        where = ", ".join(str(checkpoint.path) for checkpoint in checkpoints[:3]) or "no checkpoints"
        raise ValueError(
            f"found no power-function averages in {where}; expected files such as ema_0.05.safetensors: train with "
            "train.ema_sigma_rels = [0.05, 0.10]"
        )
    last = max(files)
    target = Profile(last.step if step is None else step, gamma_of(sigma_rel))
    weights = reconstruction_weights(list(files), target)
    opened = [safe_open(file, "pt") for file in files.values()]
    newest = opened[list(files).index(last)]
    return {name: _weighted_sum(name, opened, weights.tolist(), newest) for name in newest.keys()}


def _weighted_sum(name: str, opened: list, weights: list[float], newest) -> Tensor:
    """One tensor at a time, in float64: snapshots of a large model do not fit into memory together."""
    latest = newest.get_tensor(name)
    if not latest.is_floating_point():
        return latest
    total = torch.zeros(latest.shape, dtype=torch.float64)
    for file, weight in zip(opened, weights, strict=True):
        total.add_(file.get_tensor(name), alpha=weight)
    return total.to(latest.dtype)
