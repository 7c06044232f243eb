"""The evaluation card: an evaluation's scores with everything that is needed to compute them again, as plain data.

A card is one JSON file. It holds the report, and with it every protocol, and what the report names: checkpoint,
latents, recipe, code and environment. Its digest shows that it is as it was published; `raydit verify` computes the
scores anew.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from evaluation.report import EvaluationReport
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = "raydit.card"
VERSION = 1
CARD_FILE = "card.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """The checkpoint that was scored."""

    uri: str
    """Absolute path or URI."""
    digest: str
    """sha256 that identifies it."""
    step: int
    """Optimizer steps; 0 for one that was imported."""
    model: str
    """Model and process in a few words."""
    parameters: int
    """Numbers in the weights that were sampled with; an adapter is counted as part of its base."""
    bytes: int
    """Length of the files with these weights; of an adapter, without its base's."""
    files: dict[str, str]
    """sha256 of each file by its name."""
    raydit_version: str = ""
    """Version of raydit that wrote it."""
    source: dict[str, Any] | None = None
    """Format and name of what it was imported from; None for one that raydit trained."""
    published_size: str = ""
    """Value of --model with which official weights are opened; empty for other checkpoints."""


@dataclass(frozen=True, kw_only=True)
class LatentsFacts:
    """The latents that the checkpoint was trained on. Counts are None where the latents could not be looked at."""

    fingerprint: str
    path: str
    """Their location when the card was published."""
    images: int | None = None
    quarantined: int | None = None
    autoencoder: str = ""
    """Id, class and digest of the autoencoder that encoded them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationCard:
    """Scores of a checkpoint, and what is needed to compute them again."""

    report: EvaluationReport
    """The report, without the files of its folder."""
    checkpoint: CheckpointFacts
    latents: LatentsFacts | None
    """None for a checkpoint that records none."""
    recipe: dict[str, Any]
    """The resolved recipe by which the checkpoint was scored: its protocols are the report's."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions of packages, and the hardware, where the card was published."""
    command: str
    """The command that computes the scores again, without a comparison."""
    date: str
    """When it was published, in UTC, as ISO 8601."""

    @property
    def num_seeds(self) -> int:
        """Number of seeds that the checkpoint was sampled with."""
        return max([1, *map(len, self.report.repeats.values())])

    @property
    def digest(self) -> str:
        """sha256 of the card's content, which its file records."""
        return _digest(self._content())

    def _content(self) -> dict[str, Any]:
        report = replace(self.report, artifacts={})
        content = {"format": FORMAT, "version": VERSION, "report": json.loads(report.to_json())}
        others = {name: value for name, value in asdict(self).items() if name != "report"}
        return json.loads(json.dumps(content | others, allow_nan=False))

    def to_json(self) -> str:
        """Return the card as JSON text, with its digest."""
        return json.dumps({**self._content(), "digest": self.digest}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = CARD_FILE) -> Self:
        """Read a card that to_json wrote. name: of the file, for messages.

        Raises InvalidInput for what is no card, and for one whose content is not that of its digest.
        """
        try:
            values = json.loads(text)
            if (found := (values.get("format"), values.get("version"))) != (FORMAT, VERSION):
                raise InvalidInput(
                    f"{name}: found format {str(found[0])[:60]!r} version {str(found[1])[:20]!r}",
                    f"{FORMAT!r} version {VERSION}",
                    f"name a {CARD_FILE} that `raydit publish` wrote",
                )
            recorded = values.pop("digest")
            if (digest := _digest(values)) != recorded:
                raise InvalidInput(
                    f"{name}: found content of digest {digest[:12]}",
                    f"the recorded {str(recorded)[:12]}: the card was edited",
                    "take the card as it was published",
                )
            report = EvaluationReport.from_json(json.dumps(values["report"]))
            content = {key: value for key, value in values.items() if key not in ("format", "version")}
            card: Self = _validator().validate_python({**content, "report": report})
            return card
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidInput(
                f"{name}: found no card ({type(error).__name__}: {str(error)[:200]})",
                "what `raydit publish` wrote",
                "take the card as it was published",
            ) from error


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _validator() -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(EvaluationCard)
