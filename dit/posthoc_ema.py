"""Reconstruction of any average of the weights after training, from the power-function averages in checkpoints.

A stored average weights the course of training by its profile. The linear combination of stored profiles that is
closest to the desired profile gives the coefficients by which the stored averages are combined.
Source: Karras et al. 2024, section 3.2 and appendix C (https://arxiv.org/abs/2312.02696).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dit.checkpoint import Checkpoint
from dit.ema import gamma_from_sigma_rel
from dit.files import sha256_once
from dit.formats.digests import require_recorded
from raydit.errors import InvalidInput
from raydit.regular_files import refuse_special_file


class Profile(NamedTuple):
    """Profile of a power-function average: (gamma + 1) tau^gamma / step^(gamma + 1) at times tau <= step, else 0."""

    step: float
    gamma: float


def profile_product(one: Profile, other: Profile) -> float:
    """Return the inner product of two profiles, the integral of their product over time, in 1 / steps."""
    earlier, later = sorted((one, other))
    gammas = (one.gamma + 1) * (other.gamma + 1) / (one.gamma + other.gamma + 1)
    return gammas * (earlier.step / later.step) ** later.gamma / later.step


def reconstruction_weights(stored: Sequence[Profile], target: Profile) -> Tensor:
    """Return the coefficients (len(stored),) float64, of sum 1, that best combine stored profiles to the target.

    Least squares over time, as in the paper, which does not constrain the sum. With the sum held at 1, a parameter
    that did not change is reconstructed exactly, and few checkpoints give a closer average.
    Raises InvalidInput if the target is later than all stored profiles.
    """
    newest = max((profile.step for profile in stored), default=0)
    if not 0 < target.step <= newest:
        raise InvalidInput(
            f"an average at step {target.step:g} was requested from checkpoints up to step {newest:g}",
            "a step that the checkpoints reach",
            "choose an earlier step, or pass later checkpoints",
        )
    scale = target.step  # brings the products near 1, like the row of the constraint
    products = [[scale * profile_product(one, other) for other in stored] for one in stored]
    normal = torch.ones(len(stored) + 1, len(stored) + 1, dtype=torch.float64)  # last row: the constraint
    normal[:-1, :-1] = torch.tensor(products, dtype=torch.float64)
    normal[-1, -1] = 0
    wanted = torch.tensor([scale * profile_product(one, target) for one in stored] + [1.0], dtype=torch.float64)
    # gelsd returns the smallest of equally good solutions; large coefficients would amplify rounding errors.
    return torch.linalg.lstsq(normal, wanted[:, None], driver="gelsd").solution[:-1, 0]


def reconstruct_ema(checkpoints: Sequence[Checkpoint], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """Return the state dict of the average of relative width sigma_rel at `step`, from checkpoints of one run.

    step: by default that of the last checkpoint. Tensors that are not floating point come from the last checkpoint. One
    at step 0 has averaged nothing, and is passed over. Raises InvalidInput if the checkpoints hold no power-function
    average, or none as late as `step`, if they hold adapters, or if a file changed after it was written.
    """
    files = {profile: file for checkpoint in checkpoints for profile, file in _stored_averages(checkpoint)}
    if not files:
        where = ", ".join(str(checkpoint.path) for checkpoint in checkpoints[:3]) or "no checkpoints"
        raise InvalidInput(
            f"found no power-function averages in {where}",
            "files such as ema_0.05.safetensors, of a step after 0",
            "train with train.ema_sigma_rels = [0.05, 0.10]",
        )
    last = max(files)
    target = Profile(last.step if step is None else step, gamma_from_sigma_rel(sigma_rel))
    weights = reconstruction_weights(list(files), target)
    opened = [safe_open(file, "pt") for file in files.values()]
    newest = opened[list(files).index(last)]
    return {name: _weighted_sum(name, opened, weights.tolist(), newest) for name in newest.keys()}


def _stored_averages(checkpoint: Checkpoint) -> Iterator[tuple[Profile, Path]]:
    """Yield profile and file of each power-function average that a checkpoint lists. Raises the same errors as
    `reconstruct_ema`."""
    if checkpoint.base is not None:
        raise InvalidInput(
            f"found an adapter in {checkpoint.path}, whose averages are those of its factors",
            "checkpoints that hold all of their weights, which are combined one by one",
            "use one of the averages that were trained, or train without [train.lora]",
        )
    if checkpoint.step == 0:
        return
    for name in sorted(checkpoint.weights_names):
        if match := re.fullmatch(r"ema_(\d+(?:\.\d+)?(?:e-\d+)?)", name):
            file = checkpoint.path / f"{name}.safetensors"
            refuse_special_file(file)
            require_recorded(checkpoint.path, file.name, checkpoint.files, sha256_once)
            yield Profile(checkpoint.step, gamma_from_sigma_rel(float(match[1]))), file


def _weighted_sum(name: str, opened: list[Any], weights: list[float], newest: Any) -> Tensor:
    """Combine one tensor of all files in float64; all tensors of a large model would not fit into memory at once."""
    latest = newest.get_tensor(name)
    if not latest.is_floating_point():
        return latest
    total = torch.zeros(latest.shape, dtype=torch.float64)
    for file, weight in zip(opened, weights, strict=True):
        total.add_(file.get_tensor(name), alpha=weight)
    return total.to(latest.dtype)
