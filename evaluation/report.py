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
    """Metric name -> standard error of Frechet distances, or standard deviation over splits (is) or subsets (kid)."""
    floor: dict[str, float] = field(default_factory=dict)
    """Metrics of held-out real images against the same reference: the best that can be expected."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Frechet distance of the first N samples in random order, for some N: what its value at infinite N comes from."""
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
        curve = [(count, value) for count, value in values.get("curve", [])]
        report = cls(**{**values, "curve": curve, "protocol": EvaluationProtocol.from_dict(values["protocol"])})
        if report.protocol_id != recorded:
            raise ValueError(
                f"Found a protocol with id {report.protocol_id}, expected the recorded {recorded}: the "
                "report was edited. Evaluate the checkpoint again."
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
        """The metrics as aligned text: a column for each number of samples, and one for held-out real images."""
        generated, real = _columns(self.metrics), _columns(self.floor)
        titles = [f"generated (N = {count})" for count in generated] + [f"real floor (N = {count})" for count in real]
        rows = [["metric", *titles]]
        for kind in next(iter(generated.values())):
            cells = [self._cell(kind, count, values) for count, values in [*generated.items(), *real.items()]]
            rows.append([kind, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if len(generated.keys() | real.keys()) > 1:
            lines.append("Frechet distance falls as N grows: compare only columns of equal N.")
        return "\n".join(lines) + "\n"

    def _cell(self, kind: str, count: str, values: dict[str, float]) -> str:
        if kind not in values:
            return ""
        spread = self.errors.get(f"{kind}_{count}")
        known = spread is not None and values[kind] == self.metrics.get(f"{kind}_{count}")
        return f"{values[kind]:.6g}" + (f" +- {spread:.4g}" if known else "")


def _columns(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """{"fid_50k": 2.27, "is_50k": 278.0} -> {"50k": {"fid": 2.27, "is": 278.0}}, largest N first."""
    columns: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, count = name.rpartition("_")
        columns.setdefault(count, {})[kind] = value
    return dict(sorted(columns.items(), key=lambda column: _as_number(column[0]), reverse=True))


def _as_number(count: str) -> int:
    return int(count.removesuffix("k")) * (1000 if count.endswith("k") else 1)
