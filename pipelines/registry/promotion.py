"""The registry of models: who is champion, who challenges, and how to go back."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.registry.model_files import save_model_files
from pipelines.scoring.protocols import checkpoint_recipe
from pipelines.scoring.reports import find_reports
from pipelines.tracking.lookup import BEFORE, CHECKPOINT, DIGEST, connected_client, has_files
from pipelines.tracking.store import tracking_uri

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of a registered model: its best version, and one that scored better, but not by more than the error."""
VERSIONS = "mlflow.modelVersions"
"""Tag by which MLflow's UI knows what a model is registered as."""


class Standing(NamedTuple):
    """A checkpoint's value of the metric that decides, and what makes it comparable."""

    digest: str
    protocol_id: str
    metric: str
    value: float
    error: float
    """Standard error of the value; infinite: not known."""


def promote(uri: str, experiment: str, name: str, candidate: Standing, *, alias: str = CHAMPION) -> tuple[str, bool]:
    """Register the candidate under `name` with an alias, if it is better than who has that.

    Better is lower by more than sqrt(error^2 + error^2). Who is lower by less than that becomes challenger, instead of
    champion. Returns what was found, in words, and whether the alias was given. Raises ValueError if the holder was
    chosen by another protocol or metric, FileNotFoundError if the checkpoint is gone, and ConnectionError if MLflow
    does not answer or has not been told of it.
    """
    with connected_client(uri) as client:
        holders = {each: _holder(client, name, each) for each in (CHAMPION, CHALLENGER)}
        champion = holders[CHAMPION]
        for holder in holders.values():
            if holder is not None:
                _check_comparable(name, holder, candidate)
        if champion is not None and candidate.digest == champion.digest:
            return f"models:/{name}@{CHAMPION} is this checkpoint already", False
        holder = holders[alias]
        stays = _why_it_stays(name, alias, holder, candidate)
        if stays is None:
            number = _give(client, uri, experiment, name, candidate, alias)
            before = f", before {holder.value:.5g}" if holder else ""
            return f"models:/{name}@{alias} is now version {number}: {candidate.value:.5g}{before}", True
        if alias == CHAMPION and champion is not None and candidate.value < champion.value:
            if _why_it_stays(name, CHALLENGER, holders[CHALLENGER], candidate) is None:
                number = _give(client, uri, experiment, name, candidate, CHALLENGER)
                stays += f"; models:/{name}@{CHALLENGER} is now version {number}"
        return stays, False


def promote_report(
    uri: str, experiment: str, name: str, report: EvaluationReport, *, alias: str = CHAMPION
) -> tuple[str, bool]:
    """The same for the checkpoint of a report, by its first metric."""
    value, error = report.estimate(report.headline)
    margin = math.inf if error is None else error
    candidate = Standing(report.checkpoint_digest, report.protocol_id, report.headline, value, margin)
    return promote(uri, experiment, name, candidate, alias=alias)


def promote_checkpoint(
    checkpoint: str, name: str, *, alias: str = CHAMPION, protocol_id: str | None = None, store: str = ""
) -> tuple[str, bool]:
    """The same for a checkpoint by any of its names, by the report that is there of it.

    protocol_id: which, where there are several. store: MLflow's; left out, the one of the checkpoint's recipe.
    """
    opened = open_checkpoint(checkpoint, tracking_uri=store)
    (report,) = find_reports([opened.origin], protocol_id=protocol_id)
    config = checkpoint_recipe(opened)
    return promote_report(tracking_uri(store or config.tracking.uri), config.name, name, report, alias=alias)


def rollback(uri: str, name: str, *, alias: str = CHAMPION) -> str:
    """Give an alias back to the version that had it before. Returns what was done, in words.

    Raises ValueError if nobody had it before, FileNotFoundError if there is no such alias or that version lost its
    files, ConnectionError if MLflow does not answer.
    """
    with connected_client(uri) as client:
        number = _aliases(client, name).get(alias)
        if number is None:
            raise FileNotFoundError(
                f"models:/{name}@{alias} at {uri}: found no such alias, expected one that `raydit promote` has given"
            )
        before = client.get_model_version(name, number).tags.get(BEFORE)
        if not before:
            raise ValueError(
                f"models:/{name}@{alias} is version {number}, and nobody had it before: found nothing to go back to. "
                f"Promote another checkpoint: raydit promote CHECKPOINT --name {name}"
            )
        if not has_files(client, client.get_model_version(name, before)):
            raise FileNotFoundError(
                f"models:/{name}/{before}: found no files in the store, expected those of the model: the alias would "
                "lead to nothing. Promote its checkpoint again"
            )
        client.set_registered_model_alias(name, alias, before)
    return f"models:/{name}@{alias} is version {before} again, before {number}"


def _check_comparable(name: str, holder: Standing, candidate: Standing) -> None:
    for field in ("protocol_id", "metric"):
        found, expected = getattr(candidate, field), getattr(holder, field)
        if found != expected:
            raise ValueError(
                f"--promote {name}: found a score of {field} {found}, but models:/{name}@{CHAMPION} was chosen by "
                f"{expected}; expected equal ones, or the numbers say nothing. Score both by one protocol, or "
                "promote under another name"
            )


def _why_it_stays(name: str, alias: str, holder: Standing | None, candidate: Standing) -> str | None:
    """Why the holder of an alias keeps it; None if it does not."""
    if holder is None:
        return None
    if candidate.digest == holder.digest:
        return f"models:/{name}@{alias} is this checkpoint already" if alias == CHALLENGER else None
    margin = math.hypot(holder.error, candidate.error)
    if candidate.value < holder.value - margin:
        return None
    reason = f"not better by more than the error of {margin:.2g}"
    if math.isinf(margin):
        reason = "and how sure that is nobody knows: score both with --repeats 2 or more"
    return f"models:/{name}@{alias} stays: {holder.value:.5g} against {candidate.value:.5g}, {reason}"


def _aliases(client, name: str) -> dict[str, str]:
    """Numbers of versions by their alias; none where nothing is registered."""
    if not client.search_registered_models(f"name = '{name}'"):
        return {}
    return client.get_registered_model(name).aliases


def _holder(client, name: str, alias: str) -> Standing | None:
    """Who has an alias, by the tags of its version."""
    number = _aliases(client, name).get(alias)
    if number is None:
        return None
    tags = client.get_model_version(name, number).tags
    absent = [field for field in Standing._fields if f"raydit.{field}" not in tags]
    if absent:
        raise ValueError(
            f"models:/{name}@{alias} has no tag raydit.{absent[0]}: expected a version that raydit promoted. "
            "Promote under another name, or remove the alias"
        )
    kept: dict[str, Any] = {field: tags[f"raydit.{field}"] for field in Standing._fields}
    return Standing(**{**kept, "value": float(kept["value"]), "error": float(kept["error"])})


def _give(client, uri: str, experiment: str, name: str, candidate: Standing, alias: str) -> str:
    """Give the candidate's version the alias; the version is made, with the model's files, if it is not there."""
    model = _logged_model(client, experiment, name, candidate)
    opened = open_checkpoint(model.tags[CHECKPOINT])
    if opened.digest != candidate.digest:
        raise ValueError(
            f"{opened.origin}: found checkpoint {opened.digest[:12]}, expected {candidate.digest[:12]}, which was "
            "scored: it was written anew. Score it again"
        )
    if not client.list_logged_model_artifacts(model.model_id):
        upload(client, model.model_id, opened)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=f"Checkpoints of the experiment `{experiment}`, by raydit.")
    aliases = _aliases(client, name)
    number = _version(client, uri, name, model, opened, candidate)
    if aliases.get(alias) not in (None, number):
        client.set_model_version_tag(name, number, BEFORE, aliases[alias])
    client.set_registered_model_alias(name, alias, number)
    challenger = _holder(client, name, CHALLENGER)
    if alias == CHAMPION and challenger is not None and challenger.digest == candidate.digest:
        client.delete_registered_model_alias(name, CHALLENGER)
    return number


def _logged_model(client, experiment: str, name: str, candidate: Standing):
    found = client.get_experiment_by_name(experiment)
    query = f"tags.`{DIGEST}` = '{candidate.digest}'"
    models = client.search_logged_models([found.experiment_id], filter_string=query) if found else []
    if not models:
        raise ConnectionError(
            f"MLflow has not been told of the checkpoint {candidate.digest[:12]} yet: {name} was not promoted. Run the "
            "same command again when the tracking server answers"
        )
    return models[0]


def upload(client, model_id: str, opened: LocatedCheckpoint) -> None:
    """Put the files that make a checkpoint loadable beside what MLflow knows of it."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_model_files(opened, work / "model", work)
        # The file by which it is recognised last: no half of a model counts.
        recognised = work / "MLmodel"
        (work / "model" / "MLmodel").rename(recognised)
        client.log_model_artifacts(model_id, str(work / "model"))
        client.log_model_artifact(model_id, str(recognised))


def _version(client, uri: str, name: str, model, opened: LocatedCheckpoint, candidate: Standing) -> str:
    """Number of the version with the candidate's score: as it is there, or a new one."""
    tags = {f"raydit.{field}": str(value) for field, value in candidate._asdict().items()}
    for version in client.search_model_versions(f"name = '{name}'"):
        if tags.items() <= version.tags.items():
            return str(version.version)
    further = {
        CHECKPOINT: opened.origin,
        "raydit.step": str(opened.step),
        "raydit.latents_fingerprint": opened.config["latents_fingerprint"] or "unknown",
    }
    with _default_store(uri):
        made = client.create_model_version(
            name,
            f"models:/{model.model_id}",
            run_id=model.source_run_id,
            tags=tags | further,
            description=_description(opened, candidate),
            model_id=model.model_id,
        )
    known = json.loads(model.tags.get(VERSIONS, "[]"))
    versions = [*known, {"name": name, "version": str(made.version)}]
    client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps(versions)})
    return str(made.version)


def _description(opened: LocatedCheckpoint, candidate: Standing) -> str:
    """Markdown, shown in the UI."""
    error = "" if math.isinf(candidate.error) else f" ± {candidate.error:.3g}"
    score = f"{candidate.metric} {candidate.value:.5g}{error} by protocol `{candidate.protocol_id}`"
    return (
        f"Step {opened.step:,}: {score}.\n\nCheckpoint `{opened.origin}`, digest `{opened.digest[:12]}`. What it was "
        f"made from: `raydit lineage {opened.origin}`"
    )


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """A registry in a database looks for the model in the process's default store, whatever the client's is."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before
