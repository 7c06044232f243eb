"""Position embeddings for another grid of patches. Rotary ones have no parameters, and need nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.adaptation.draft_weights import Draft, TrainedModel
from dit.config import UViTConfig
from dit.layers.embeddings import position_embedding

NAME = "pos_embed"


def adapt_positions(draft: Draft, base: TrainedModel, target: TrainedModel) -> None:
    """Compute sine-cosine positions anew for another grid, and interpolate learned ones."""
    if NAME not in draft.weights:
        return
    old, new = base.config, target.config
    if isinstance(new, UViTConfig):
        if old.num_conditions != new.num_conditions:
            draft.change(NAME, _change_conditions(draft.weights[NAME], new), "positions of the conditions")
        if old.grid_size != new.grid_size:
            interpolated = interpolate_positions(draft.weights[NAME], old.grid_size, new.grid_size)
            draft.change(NAME, interpolated, f"interpolated from {_grid(old.grid_size)} to {_grid(new.grid_size)}")
    elif old.grid_size != new.grid_size:
        table = position_embedding(new.hidden_size, *new.grid_size).float()
        draft.change(NAME, table[None], f"computed for {_grid(new.grid_size)} instead of {_grid(old.grid_size)}")


def interpolate_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate learned positions (1, S + rows * columns, D) to another grid, bicubically, as vision transformers do.

    Those of the S conditioning tokens, which come first, are kept.
    """
    count = positions.shape[1] - old[0] * old[1]
    conditions, patches = positions[:, :count], positions[:, count:]
    grid = patches.transpose(1, 2).unflatten(2, old)  # (1, D, rows, columns)
    resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([conditions, resized.flatten(2).transpose(1, 2)], dim=1).contiguous()


def _change_conditions(positions: Tensor, new: UViTConfig) -> Tensor:
    """Add the position of the label, zero, before that of the timestep, or remove it."""
    if new.num_conditions == 1:
        return positions[:, 1:].contiguous()
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _grid(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} patches"
