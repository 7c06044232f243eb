"""Compare each score of a card with the score that was computed again."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import hypot, sqrt
from typing import Literal

from evaluation.compare import estimate_with_standard_error
from evaluation.report import EvaluationReport, align_columns
from evaluation.uncertainty import BLOCKS

ROUNDING = 1e-3
"""Largest relative difference that counts as rounding. The same samples computed by another device, or by kernels for
another batch, differ in the last digits, and then some of their pixels by one grey level."""

ERROR_OF_ERRORS = hypot(1, 1) / sqrt(2 * (BLOCKS - 1))
"""Combined standard error of two errors, as a share of them: each is a standard deviation over BLOCKS values."""

Verdict = Literal["equal", "rounding", "error", "differs", "missing"]
WORDS: dict[Verdict, str] = {
    "equal": "equal to the bit",
    "rounding": "equal within rounding",
    "error": "equal within the errors",
    "differs": "DIFFERS",
    "missing": "MISSING",
}
"""Verdicts in words."""


@dataclass(frozen=True, kw_only=True)
class ScoreCheck:
    """A score of a card beside the one that was computed again."""

    name: str
    """Name of the metric, and of what, if it is not of the card's samples."""
    stated: float
    found: float | None
    """The score that was computed again; None if there is none."""
    error: float | None
    """Combined standard error of both values; None if it is not known."""
    verdict: Verdict

    @property
    def holds(self) -> bool:
        """Whether the score on the card is right."""
        return self.verdict in ("equal", "rounding", "error")


def check_scores(stated: EvaluationReport, found: EvaluationReport) -> list[ScoreCheck]:
    """Compare all scores of a card's report with those of a report by the same protocols, seeds and checkpoint."""
    return list(_checks(stated, found))


def _checks(stated: EvaluationReport, found: EvaluationReport) -> Iterator[ScoreCheck]:
    for name, value in stated.metrics.items():
        yield _check(name, value, found.metrics.get(name), _combined_error(found, name), found.errors.get(name))
    for name, value in stated.errors.items():
        error = found.errors.get(name)
        yield _check(f"{name}, error", value, error, None if error is None else error * ERROR_OF_ERRORS)
    for name, values in stated.repeats.items():
        others = found.repeats.get(name, [])
        for number, value in enumerate(values[1:], start=1):
            label = f"{name}, seed {stated.protocol.seed + number}"
            other = others[number] if number < len(others) else None
            yield _check(label, value, other, _combined_error(found, name), found.errors.get(name))
    baselines = {"real images": "real_baseline", "reconstructions": "reconstructions"}
    for title, field in baselines.items():
        for name, value in getattr(stated, field).items():
            label = f"{name}, {title}"
            yield _check(label, value, getattr(found, field).get(name), None, found.errors.get(name))
    again = _class_distances(found)
    for name, value in _class_distances(stated).items():
        yield _check(name, value, again.get(name), None)


def _class_distances(report: EvaluationReport) -> dict[str, float]:
    """Return the distances of single classes in each extractor's features, by a name that says what they are."""
    return {
        f"{each.metric} of class {each.name}, {part.protocol.extractor}": each.value
        for part in report.parts
        for each in part.per_class
        if each.value is not None
    }


def _combined_error(found: EvaluationReport, name: str) -> float | None:
    """Return the combined standard error of a stated score and of the one computed again; None if it is not known.

    Both have the error that was computed again: the stated one is as much a statement as the score.
    """
    if name not in found.metrics:
        return None
    _, error = estimate_with_standard_error(replace(found, repeats={}), name)
    return None if error is None else hypot(error, error)


def _check(
    name: str, stated: float, found: float | None, error: float | None, spread: float | None = None
) -> ScoreCheck:
    verdict = _verdict(stated, found, error, spread or 0.0)
    return ScoreCheck(name=name, stated=stated, found=found, error=error, verdict=verdict)


def _verdict(stated: float, found: float | None, error: float | None, spread: float) -> Verdict:
    """Judge a stated score. spread: its error or standard deviation, by which scores near zero are rounded."""
    if found is None:
        return "missing"
    if stated == found:
        return "equal"
    difference = abs(stated - found)
    if difference <= ROUNDING * max(abs(stated), abs(found), spread):
        return "rounding"
    return "error" if error is not None and difference < error else "differs"


def verification_table(checks: list[ScoreCheck]) -> str:
    """Return aligned text with a row for each score."""
    rows = [["metric", "card", "computed again", ""]]
    for check in checks:
        error = "" if check.error is None else f" +- {check.error:.3g}"
        found = "" if check.found is None else f"{check.found:.6g}{error}"
        rows.append([check.name, f"{check.stated:.6g}", found, WORDS[check.verdict]])
    return "\n".join(align_columns(rows))
