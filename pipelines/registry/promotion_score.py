"""The scores by which checkpoints are promoted: those that registered versions record, and those of reports."""

import math
from typing import NamedTuple, Self

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import find_recorded
from pipelines.scoring.reports.report_files import find_reports
from pipelines.tracking import tags
from raydit.errors import InvalidInput, RayditError


class PromotionScore(NamedTuple):
    """The score by which a checkpoint is promoted, and what makes it comparable. Kept in tags of its version."""

    digest: str
    """Digest of the checkpoint."""
    protocol_id: str
    metric: str
    value: float
    """Lower is better."""
    error: float
    """Standard error of the value; infinite if unknown."""
    protocol: str = ""
    """Summary of the protocol."""
    checkpoint: str = ""
    """Path or URI of the checkpoint when its version was registered; empty for the score of a report."""
    has_files: bool = True
    """Whether the store holds the files of the registered version, so that it can be loaded."""

    @property
    def protocol_label(self) -> str:
        """The protocol's id and what it says."""
        return f"{self.protocol_id} ({self.protocol})" if self.protocol else self.protocol_id

    @property
    def estimate(self) -> str:
        """The value, with its error if that is known."""
        return f"{self.value:.5g}" + ("" if math.isinf(self.error) else f" +- {self.error:.3g}")

    def is_of_same_score(self, other: Self) -> bool:
        """Return whether two scores are of equal value and error."""
        return (self.value, self.error) == (other.value, other.error)

    @classmethod
    def from_report(cls, report: EvaluationReport) -> Self:
        """Return the score of a report by its headline metric."""
        value, error = report.estimate(report.headline)
        margin = math.inf if error is None else error
        protocol = report.protocol
        return cls(report.checkpoint_digest, protocol.protocol_id, report.headline, value, margin, protocol.summary)


SCORE_TAGS = {
    "digest": tags.VERSION_DIGEST,
    "protocol_id": tags.PROTOCOL_ID,
    "metric": tags.VERSION_METRIC,
    "value": tags.VERSION_VALUE,
    "error": tags.VERSION_ERROR,
}
"""Tags of a registered version that keep its PromotionScore, by field."""


def find_present_score(holder: PromotionScore, candidate: PromotionScore, tracking_uri: str) -> PromotionScore:
    """Return a registered version's score by the present report of its checkpoint, which may be over more seeds.

    Its recorded score where there is no such report any more. candidate: the score that it is compared with, which may
    be of the same checkpoint. tracking_uri: as of find_reports.
    """
    if holder.digest == candidate.digest:
        return holder._replace(value=candidate.value, error=candidate.error)
    try:
        location = find_recorded(holder.checkpoint, holder.digest)
        (report,) = find_reports([location], protocol_id=holder.protocol_id, tracking_uri=tracking_uri)
    except (RayditError, OSError):  # the output may have been removed: the version is a copy that outlives it
        return holder
    if report.disqualified or (report.checkpoint_digest, report.headline) != (holder.digest, holder.metric):
        return holder
    present = PromotionScore.from_report(report)
    return holder._replace(value=present.value, error=present.error)


def check_comparable(name: str, alias: str, holder: PromotionScore, candidate: PromotionScore) -> None:
    """Raise InvalidInput if two scores are by different protocols or metrics."""
    for field, shown in (("protocol_id", "protocol_label"), ("metric", "metric")):
        if getattr(candidate, field) != getattr(holder, field):
            raise InvalidInput(
                f"--promote {name}: found a score of {field} {getattr(candidate, shown)}",
                f"{getattr(holder, shown)}, by which models:/{name}@{alias} was chosen: other scores cannot be "
                "compared",
                "score both checkpoints by one protocol, or promote under another name",
            )
