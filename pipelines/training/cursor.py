"""The data cursor of a checkpoint: where its training stood in the data, and the reports that led there."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dit.checkpoint import Checkpoint
from dit.metrics_window import WindowTotals
from pipelines.training.data.order import OrderRecord
from pipelines.training.group.messages import Report, Validated


@dataclass(frozen=True)
class DataCursor:
    """What trainer/state.json holds besides the numbers of steps and batches, which dit.checkpoint writes."""

    reports: list[Report]
    """Reports since the previous checkpoint, which a killed driver may not have received."""
    seed: int
    images_seen: int
    order: OrderRecord
    windows: list[WindowTotals] = field(default_factory=list)
    """What each worker had measured since the last report, by rank; only in an interrupted checkpoint."""
    validations: list[Validated] = field(default_factory=list)
    """Losses of held-out latents since the previous checkpoint; a regular one has those of its own step, if any."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file, leaving out entries that are empty."""
        optional = {name for name in ("windows", "validations") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in optional}

    def validation_at(self, step: int) -> dict[str, float]:
        """Return the losses of held-out latents after a step; empty if there are none."""
        return next((each.metrics for each in reversed(self.validations) if each.step == step), {})

    def window_of(self, rank: int, num_workers: int) -> WindowTotals | None:
        """Return the window that a worker continues with; None if the checkpoint is regular."""
        if len(self.windows) == num_workers:
            return self.windows[rank]
        return mean_window(self.windows) if self.windows else None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "DataCursor":
        """Read the cursor of a checkpoint; an older or imported one may lack some entries."""
        state = checkpoint.trainer_state
        return cls(
            reports=[Report(**report) for report in state.get("reports", [])],
            seed=state.get("seed", 0),
            images_seen=state.get("images_seen", 0),
            order=state.get("order", {"kind": "global"}),
            windows=[WindowTotals(**window) for window in state.get("windows", [])],
            validations=[Validated(**validated) for validated in state.get("validations", [])],
        )


def mean_window(windows: list[WindowTotals]) -> WindowTotals:
    """Return the mean over workers, with which any other number of workers reports the same means, up to rounding."""
    first = windows[0]
    return replace(
        first, sums={name: sum(window.sums[name] for window in windows) / len(windows) for name in first.sums}
    )
