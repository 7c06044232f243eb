"""Several reports side by side: only where they are comparable, and with what is no difference marked as such."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot

from evaluation.report import EvaluationReport, aligned

NO_DIFFERENCE = "~"
"""Marks a value whose distance from the first report's is smaller than their combined error."""


@dataclass(frozen=True)
class Comparison:
    """Metrics of several reports; the first is what the others are compared with."""

    names: list[str]
    """What each report is called: its checkpoint, without what all of them share."""
    reports: list[EvaluationReport]
    differing: list[str]
    """Fields of the protocol that are not the same everywhere; empty: the numbers are comparable."""

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order of the reports."""
        return list(dict.fromkeys(name for report in self.reports for name in report.metrics))

    def same(self, metric: str, index: int) -> bool:
        """Whether a report's metric is nearer to the first report's than sqrt(error^2 + error^2).

        False where either value or both errors are unknown.
        """
        pair = [self.reports[0], self.reports[index]]
        if any(metric not in report.metrics for report in pair):
            return False
        (first, first_error), (value, error) = (report.estimate(metric) for report in pair)
        errors = [known for known in (first_error, error) if known is not None]
        return bool(errors) and abs(value - first) < hypot(*errors)

    def table(self) -> str:
        """Aligned text: a row for each metric, a column for each report."""
        rows = [["metric", *self.names]]
        for metric in self.metrics:
            rows.append([metric, *(self._cell(metric, index) for index in range(len(self.reports)))])
        lines = aligned(rows)
        if any(cell.endswith(NO_DIFFERENCE) for row in rows for cell in row[1:]):
            lines.append(f"{NO_DIFFERENCE} differs from {self.names[0]} by less than the combined error.")
        if self.differing:
            lines.append(f"Not comparable: the protocols differ in {', '.join(self.differing)}.")
        return "\n".join(lines) + "\n"

    def _cell(self, metric: str, index: int) -> str:
        report = self.reports[index]
        if metric not in report.metrics:
            return ""
        value, known = report.estimate(metric)
        error = "" if known is None else f" +- {known:.3g}"
        mark = f" {NO_DIFFERENCE}" if index and self.same(metric, index) else ""
        return f"{value:.5g}{error}{mark}"


def compare(reports: Sequence[EvaluationReport], *, allow_unequal: bool = False) -> Comparison:
    """Set reports side by side.

    Raises ValueError if their protocols are not equal, naming the fields that differ, unless allow_unequal; and if
    there are fewer than 2.
    """
    if len(reports) < 2:
        raise ValueError(f"Found {len(reports)} reports, expected at least 2. Name more checkpoints or reports.")
    protocols = [asdict(report.protocol) for report in reports]
    differing = [name for name in protocols[0] if any(other[name] != protocols[0][name] for other in protocols)]
    if differing and not allow_unequal:
        found = "; ".join(f"{name}: {' against '.join(_distinct(protocols, name))}" for name in differing)
        ids = ", ".join(dict.fromkeys(report.protocol_id for report in reports))
        raise ValueError(
            f"Found reports of protocols {ids}, expected "
            f"one: numbers of unequal protocols say nothing about the checkpoints. They differ in {found}. Evaluate "
            "all by one recipe, or allow unequal protocols."
        )
    return Comparison(_short_names([report.checkpoint for report in reports]), list(reports), differing)


def _distinct(protocols: Sequence[dict], name: str) -> list[str]:
    return list(dict.fromkeys(repr(protocol[name]) for protocol in protocols))


def _short_names(checkpoints: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share; numbered where that leaves two equal."""
    parts = [checkpoint.rstrip("/").split("/") for checkpoint in checkpoints]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == parts[0][shared] for path in parts):
        shared += 1
    names = ["/".join(path[shared:]) for path in parts]
    return names if len(set(names)) == len(names) else [f"{index + 1}: {name}" for index, name in enumerate(names)]
