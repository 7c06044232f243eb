"""The evaluation report: protocol, checkpoint, numbers and how sure they are; one JSON file."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from evaluation.protocol import EvaluationProtocol

REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Scores of one checkpoint under one protocol."""

    protocol: EvaluationProtocol
    checkpoint: str
    """Path or URI of the checkpoint."""
    checkpoint_digest: str
    """sha256 that identifies its weights."""
    metrics: dict[str, float]
    """Metric name -> value."""
    errors: dict[str, float] = field(default_factory=dict)
    """Metric name -> standard deviation over splits or subsets."""
    floor: dict[str, float] = field(default_factory=dict)
    """Metrics of held-out real images against the same reference: the best that can be expected."""
    warnings: list[str] = field(default_factory=list)
    """What a reader of the numbers must know."""
    timings: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """Name -> path of files that belong to the report, such as an image grid."""

    @property
    def protocol_id(self) -> str:
        """Equal ids: comparable numbers."""
        return self.protocol.protocol_id

    def to_json(self) -> str:
        """The report as JSON text, with the protocol's id."""
        values = {**asdict(self), "protocol": self.protocol.to_dict(), "protocol_id": self.protocol_id}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of to_json. Raises ValueError if the protocol does not give the recorded id."""
        values: dict[str, Any] = json.loads(text)
        recorded = values.pop("protocol_id")
        report = cls(**{**values, "protocol": EvaluationProtocol.from_dict(values["protocol"])})
        if report.protocol_id != recorded:
            raise ValueError(
                f"Found a protocol with id {report.protocol_id}, expected the recorded {recorded}: the report "
                "was edited. Evaluate the checkpoint again."
            )
        return report

    def save(self, folder: str | Path) -> Path:
        """Write report.json into a folder, whole or not at all, and return its path."""
        path = Path(folder) / REPORT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{REPORT_FILE}.{os.getpid()}.tmp")
        temporary.write_text(self.to_json())
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from its file, or from the folder that holds it."""
        path = Path(path)
        return cls.from_json((path / REPORT_FILE if path.is_dir() else path).read_text())

    def table(self) -> str:
        """The metrics as aligned text, held-out real images beside the generated ones."""
        generated, real, errors = (_by_kind(values) for values in (self.metrics, self.floor, self.errors))
        rows = [("metric", _title("generated", generated), _title("real floor", real) if real else "")]
        for kind, (_, value) in generated.items():
            spread = f" +- {errors[kind][1]:.4g}" if kind in errors else ""
            rows.append((kind, f"{value:.6g}{spread}", f"{real[kind][1]:.6g}" if kind in real else ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if real and _counts(real) != _counts(generated):
            lines.append("Frechet distance falls as N grows: compare the two columns only where N is equal.")
        return "\n".join(lines) + "\n"


def _by_kind(metrics: dict[str, float]) -> dict[str, tuple[str, float]]:
    """{"fid_50k": 2.27} -> {"fid": ("50k", 2.27)}."""
    split = ((name.rpartition("_"), value) for name, value in metrics.items())
    return {kind: (count, value) for (kind, _, count), value in split}


def _counts(by_kind: dict[str, tuple[str, float]]) -> set[str]:
    return {count for count, _ in by_kind.values()}


def _title(side: str, by_kind: dict[str, tuple[str, float]]) -> str:
    return f"{side} (N = {', '.join(sorted(_counts(by_kind)))})"
