"""The data cursor of a checkpoint: where its training stood in the data, and the reports that led there."""

from dataclasses import asdict, dataclass
from typing import Any

from dit.checkpoint import Checkpoint
from pipelines.training.messages import Report
from pipelines.training.order import OrderRecord


@dataclass(frozen=True)
class DataCursor:
    """What trainer/state.json holds besides the numbers of steps and batches, which dit.checkpoint writes."""

    reports: list[Report]
    """Reports since the previous checkpoint, which a killed driver may not have received."""
    seed: int
    images_seen: int
    order: OrderRecord

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        return asdict(self)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "DataCursor":
        """Read the cursor of a checkpoint; an older or imported one may lack some entries."""
        state = checkpoint.trainer_state
        return cls(
            reports=[Report(**report) for report in state.get("reports", [])],
            seed=state.get("seed", 0),
            images_seen=state.get("images_seen", 0),
            order=state.get("order", {"kind": "global"}),
        )
