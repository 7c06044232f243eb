"""The scores by which checkpoints are promoted: those that registered versions record, and those of reports."""

import math
from typing import Any, NamedTuple, Self

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import find_recorded
from pipelines.registry.queries import find_protocol
from pipelines.scoring.reports.report_files import find_reports
from pipelines.tracking import tags
from pipelines.tracking.lookup import has_files
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
    """What the protocol says, in a few words."""
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


def find_aliases(client: Any, name: str) -> dict[str, str]:
    """Return version numbers by alias; empty if there is no registered model of that name."""
    if not client.search_registered_models(f"name {tags.equals(name)}"):
        return {}
    return client.get_registered_model(name).aliases


def read_holder(client: Any, name: str, alias: str) -> PromotionScore | None:
    """Return the score of the version that holds an alias, from the tags of the version."""
    number = find_aliases(client, name).get(alias)
    if number is None:
        return None
    version = client.get_model_version(name, number)
    found = version.tags
    absent = [tag for tag in SCORE_TAGS.values() if tag not in found]
    if absent:
        raise InvalidInput(
            f"models:/{name}@{alias}: found a version without the tag {absent[0]}",
            "one that raydit promoted",
            "promote under another name, or remove the alias",
        )
    kept: dict[str, Any] = {field: found[tag] for field, tag in SCORE_TAGS.items()}
    kept["protocol"] = found.get(tags.PROTOCOL) or find_protocol(client, kept["protocol_id"])
    kept["checkpoint"] = found.get(tags.CHECKPOINT, "")
    kept |= {"value": float(kept["value"]), "error": float(kept["error"]), "has_files": has_files(client, version)}
    return PromotionScore(**kept)


def find_current_score(holder: PromotionScore, tracking_uri: str) -> PromotionScore:
    """Return a registered version's score by the present report of its checkpoint, which may be over more seeds.

    Its recorded score where there is no such report any more. tracking_uri: as of find_reports.
    """
    try:
        location = find_recorded(holder.checkpoint, holder.digest)
        (report,) = find_reports([location], protocol_id=holder.protocol_id, tracking_uri=tracking_uri)
    except (RayditError, OSError):  # the output may have been removed: the version is a copy that outlives it
        return holder
    if report.disqualified or (report.checkpoint_digest, report.headline) != (holder.digest, holder.metric):
        return holder
    current = PromotionScore.from_report(report)
    return holder._replace(value=current.value, error=current.error)


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
