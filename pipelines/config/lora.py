"""The recipe's section [train.lora]: training of a low-rank adapter instead of all weights."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from pipelines.config.defaults import leave_out_defaults
from pipelines.config.model import PositiveInt
from raydit.errors import InvalidInput

DEFAULT_RANK, DEFAULT_TARGETS = 16, ("attention",)
"""Default values of rank and targets."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The low-rank adapter that is trained: the weight of each chosen layer becomes W + (alpha / rank) B A.

    Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685).
    """

    rank: PositiveInt | None = None
    """Columns of B and rows of A, at most the smaller width of each chosen layer; 16 when left out."""
    alpha: Annotated[float, Ge(0)] | None = None
    """Numerator of the scale alpha / rank; the rank, for a scale of 1, when left out. 0 leaves the base as it is."""
    targets: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Linear layers that have factors: "attention", "mlp", "modulation", or globs over their names as in start.freeze,
    such as "blocks.{20..27}.mlp.*"; "attention" when left out."""

    def __post_init__(self) -> None:
        if len({*self.targets}) < len(self.targets):
            raise InvalidInput(f"targets: found {list(self.targets)}", "each once", "remove what is repeated")
        leave_out_defaults(self, self.defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """What fields mean where they are left out."""
        return {"rank": DEFAULT_RANK, "alpha": float(self.chosen_rank), "targets": DEFAULT_TARGETS}

    @property
    def chosen_rank(self) -> int:
        """Columns of B and rows of A."""
        return self.rank or DEFAULT_RANK

    @property
    def chosen_alpha(self) -> float:
        """Numerator of the scale."""
        return float(self.chosen_rank) if self.alpha is None else self.alpha

    @property
    def chosen_targets(self) -> tuple[str, ...]:
        """Words and globs for the layers that have factors."""
        return self.targets or DEFAULT_TARGETS
