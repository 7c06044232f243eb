"""Weights on their way from one model to another, with a note on every tensor that was changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit.config import DiTConfig, UViTConfig


@dataclass(frozen=True)
class TrainedModel:
    """A model together with what gives its inputs and outputs their meaning."""

    config: DiTConfig | UViTConfig
    objective: Mapping[str, Any]
    """Kind and settings of the process, as checkpoints record them."""
    class_names: Sequence[str]
    """Names of the classes in the order of their labels."""


@dataclass
class Draft:
    """Weights that are being fitted to another model."""

    weights: dict[str, Tensor]
    """State dict so far, by the names of the model that it is for."""
    notes: dict[str, str] = field(default_factory=dict)
    """What was changed, by the names of the tensors that are no longer those of the start."""
    dropped: list[str] = field(default_factory=list)
    """Names, in the model of the start, of tensors that are not used in the new model."""

    def change(self, name: str, tensor: Tensor, note: str) -> None:
        """Replace a tensor. note: what was done; joined to what was done to it before."""
        self.weights[name] = tensor
        self.notes[name] = f"{self.notes[name]}; {note}" if name in self.notes else note


def part_names(config: DiTConfig | UViTConfig) -> dict[str, tuple[str, ...]]:
    """Return the first parts of the parameter names of each part that a recipe can reset, by the part's name.

    "timesteps" is no such part: it depends on the objective.
    """
    if isinstance(config, UViTConfig):
        return {
            "labels": ("label_emb.",),
            "embedding": ("patch_embed.",),
            "final": ("norm.", "decoder_pred.", "final_layer."),
            "positions": ("pos_embed",),
            "timesteps": ("time_embed.",),
        }
    return {
        "labels": ("y_embedder.",),
        "embedding": ("x_embedder.", "head.x_embedder."),
        "final": ("final_layer.",),
        "positions": ("pos_embed",),
        "timesteps": ("t_embedder.",),
    }
