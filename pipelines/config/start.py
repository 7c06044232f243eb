"""The recipe's section [train.start]: the checkpoint that a training starts from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from dit.config import ProcessKind, ResetPart
from raydit.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The checkpoint whose weights a training starts from, what it does not take over, and what it does not train."""

    checkpoint: Annotated[str, MinLen(1)] | None = None
    """Checkpoint to start from, in every form that `raydit evaluate` takes: a folder or URI of raydit's or of a
    diffusers pipeline, runs:/ID, models:/NAME@ALIAS, or a file of official weights. The section needs it."""
    model: str | None = None
    """Published size of the weights in a file, which records none, such as "DiT-XL/2"."""
    objective: ProcessKind | None = None
    """Process that the weights in a file were trained for: "flow" for SiT's and REPA's; "diffusion" when left out."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged or trained weights of the checkpoint; "ema" when left out."""
    reset: tuple[ResetPart, ...] = ()
    """Parts that start as in a training from scratch: "labels", "embedding" (of patches), "final" (layer) and
    "positions"; "objective" continues with weights of another objective."""
    freeze: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Parameters that are not trained: globs over their names, in which "*" matches dots as well and braces count or
    enumerate, such as "blocks.{0..11}.*"."""

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise InvalidInput("checkpoint: missing", "a value", "set checkpoint, or remove the section")
        for name in ("reset", "freeze"):
            given = getattr(self, name)
            if len({*given}) < len(given):
                raise InvalidInput(f"{name}: found {list(given)}", "each once", "remove what is repeated")

    @property
    def chosen_weights(self) -> str:
        """The weights to start from: "ema" or "raw"."""
        return self.weights or "ema"

    def describe(self) -> str:
        """Return in words what the training starts from, what starts anew and what is not trained."""
        parts = [f"{self.checkpoint} ({self.chosen_weights} weights)"]
        parts += [f"{name} {', '.join(values)}" for name in ("reset", "freeze") if (values := getattr(self, name))]
        return "; ".join(parts)
