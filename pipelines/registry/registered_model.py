"""A registered model in MLflow: its versions, each of a checkpoint and a score, and the aliases that lead to them."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from pipelines.registry.promotion_score import SCORE_TAGS, PromotionScore
from pipelines.registry.queries import find_protocol
from pipelines.tracking import tags
from pipelines.tracking.lookup import has_files, model_id_of
from pipelines.tracking.model_writer import picture_in
from pipelines.tracking.store import default_store
from raydit.errors import InvalidInput

MODEL_VERSIONS = "mlflow.modelVersions"
"""Tag by which MLflow's UI knows the registered versions of a LoggedModel."""
CHECKPOINT_TAGS = (tags.CHECKPOINT, tags.VERSION_STEP, tags.VERSION_WEIGHTS, tags.LATENTS_FINGERPRINT)
"""Tags of a version that say which checkpoint it is a copy of, whatever its score."""


@dataclass(frozen=True)
class RegisteredModel:
    """A model of MLflow's registry, which may not be there yet."""

    client: Any
    """MlflowClient of the store."""
    uri: str
    name: str

    def find_aliases(self) -> dict[str, str]:
        """Return version numbers by alias; empty if there is no registered model of that name."""
        return self.client.get_registered_model(self.name).aliases if self._exists() else {}

    def read_holder(self, alias: str) -> PromotionScore | None:
        """Return the score of the version that holds an alias, from the version's tags."""
        number = self.find_aliases().get(alias)
        if number is None:
            return None
        version = self.client.get_model_version(self.name, number)
        found = version.tags
        absent = [tag for tag in SCORE_TAGS.values() if tag not in found]
        if absent:
            raise InvalidInput(
                f"models:/{self.name}@{alias}: found a version without the tag {absent[0]}",
                "one that raydit promoted",
                "promote under another name, or remove the alias",
            )
        kept: dict[str, Any] = {field: found[tag] for field, tag in SCORE_TAGS.items()}
        kept["protocol"] = found.get(tags.PROTOCOL) or find_protocol(self.client, kept["protocol_id"])
        kept["checkpoint"] = found.get(tags.CHECKPOINT, "")
        kept |= {"value": float(kept["value"]), "error": float(kept["error"])}
        return PromotionScore(**kept, has_files=has_files(self.client, version))

    def add_version(self, logged_model: Any, checkpoint_tags: dict[str, str], score: PromotionScore) -> str:
        """Return the number of the LoggedModel's version of this score, creating it if there is none.

        checkpoint_tags: values of CHECKPOINT_TAGS.
        """
        score_tags = {tag: str(getattr(score, field)) for field, tag in SCORE_TAGS.items()}
        for version in self.client.search_model_versions(f"name {tags.equals(self.name)}"):
            if model_id_of(version) == logged_model.model_id and score_tags.items() <= version.tags.items():
                return str(version.version)
        picture = picture_in(logged_model.tags.get(tags.DESCRIPTION, ""))
        with default_store(self.uri):
            created = self.client.create_model_version(
                self.name,
                f"models:/{logged_model.model_id}",
                run_id=logged_model.source_run_id,
                tags=score_tags | {tags.PROTOCOL: score.protocol} | checkpoint_tags,
                description=f"{_describe_version(checkpoint_tags, score)}\n\n{picture}".strip(),
                model_id=logged_model.model_id,
            )
        known = json.loads(logged_model.tags.get(MODEL_VERSIONS, "[]"))
        versions = [*known, {"name": self.name, "version": str(created.version)}]
        self.client.set_logged_model_tags(logged_model.model_id, {MODEL_VERSIONS: json.dumps(versions)})
        return str(created.version)

    def rescore_holder(self, alias: str, score: PromotionScore) -> str:
        """Move an alias to a version of the same checkpoint with another score, and return its number.

        A version keeps the score that it was made for.
        """
        version = self.client.get_model_version(self.name, self.find_aliases()[alias])
        logged_model = self.client.get_logged_model(model_id_of(version))
        checkpoint_tags = {tag: version.tags[tag] for tag in CHECKPOINT_TAGS if tag in version.tags}
        number = self.add_version(logged_model, checkpoint_tags, score)
        self.move_alias(alias, number)
        return number

    def move_alias(self, alias: str, number: str) -> None:
        """Give an alias to a version, and record where a rollback leads: to the last version of another checkpoint."""
        before = self.find_aliases().get(alias, "")
        if before and before != number:
            holder, version = (self.client.get_model_version(self.name, each).tags for each in (before, number))
            if holder.get(tags.VERSION_DIGEST) == version.get(tags.VERSION_DIGEST):
                before = tags.previous_version(holder, alias)
        if before != number:
            self.client.set_model_version_tag(self.name, number, tags.previous_tag(alias), before)
        self.client.set_registered_model_alias(self.name, alias, number)

    def create_if_absent(self, experiment: str) -> None:
        """Create the registered model, unless there is one of this name."""
        if not self._exists():
            self.client.create_registered_model(self.name, description=_describe_model(experiment))

    def show_picture(self, experiment: str, picture: str) -> None:
        """Show the champion's picture in the model's description, unless someone has written another description."""
        description = self.client.get_registered_model(self.name).description or ""
        shown = picture_in(description)
        text = description.replace(shown, "").strip() if shown else description
        if picture and text == _describe_model(experiment):
            self.client.update_registered_model(self.name, f"{text}\n\n{picture}")

    def _exists(self) -> bool:
        return bool(self.client.search_registered_models(f"name {tags.equals(self.name)}"))


def _describe_model(experiment: str) -> str:
    return f"Checkpoints of the experiment `{experiment}`, by raydit."


def _describe_version(checkpoint_tags: dict[str, str], score: PromotionScore) -> str:
    """Return the description of a version in Markdown. checkpoint_tags: values of CHECKPOINT_TAGS."""
    checkpoint = checkpoint_tags[tags.CHECKPOINT]
    estimate = score.estimate.replace("+-", "±")
    scored = f"{score.metric} {estimate} by protocol `{score.protocol_id}`"
    scored += f" ({score.protocol})" if score.protocol else ""
    return (
        f"Step {int(checkpoint_tags[tags.VERSION_STEP]):,}: {scored}.\n\nCheckpoint `{checkpoint}`, digest "
        f"`{score.digest[:12]}`. Its lineage: `raydit lineage {shlex.quote(checkpoint)}`"
    )
