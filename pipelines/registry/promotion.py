"""Promotion in the model registry: which version is champion, which is challenger, and how to roll back."""

import json
import math
import shlex
from typing import Any, NamedTuple

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import LocatedCheckpoint, find_recorded, open_checkpoint
from pipelines.registry.model_files import upload
from pipelines.registry.promotion_score import (
    SCORE_TAGS,
    PromotionScore,
    check_comparable,
    find_aliases,
    find_current_score,
    read_holder,
)
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from pipelines.scoring.reports.report_files import find_reports
from pipelines.tracking import tags
from pipelines.tracking.experiments import REGISTERED_NAME_FORBIDS, clean_name, find_experiment
from pipelines.tracking.lookup import connected_client, has_files, is_uploaded, model_id_of
from pipelines.tracking.model_writer import picture_in
from pipelines.tracking.moved_store import refuse_moved
from pipelines.tracking.searches import find_version
from pipelines.tracking.store import default_store, tracking_uri
from raydit.errors import InvalidInput, NotFound, Unreachable

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of a registered model: its best version, and one that scored better by less than the error."""
REGISTERED_VERSIONS = "mlflow.modelVersions"
"""Tag by which MLflow's UI knows the registered versions of a LoggedModel."""


CHECKPOINT_TAGS = (tags.CHECKPOINT, tags.VERSION_STEP, tags.VERSION_WEIGHTS, tags.LATENTS_FINGERPRINT)
"""Tags of a registered version that say which checkpoint it is a copy of, whatever its score."""


class Promotion(NamedTuple):
    """The outcome of a promotion."""

    explanation: str
    given: bool
    """Whether the candidate got the alias."""


def promote(
    uri: str,
    experiment: str,
    name: str,
    candidate: PromotionScore,
    *,
    alias: str = CHAMPION,
    opened: LocatedCheckpoint | None = None,
) -> Promotion:
    """Register the candidate under `name` and give it an alias, if it is better than the version that holds it.

    Better means lower by more than the combined error, sqrt(error^2 + error^2). A candidate that is lower by less
    becomes challenger instead of champion. A holder whose files are missing from the store is registered again, and one
    that has been scored again since keeps its alias as a version of its present score, by which it is compared.
    opened: the checkpoint; None: it is opened where MLflow has recorded it, which is not possible for weights of other
    projects that were opened with further options. Raises InvalidInput if the holder was chosen by another protocol or
    metric, NotFound if the checkpoint is gone, and Unreachable if MLflow does not answer or does not know it.
    """
    refuse_name(name)
    refuse_moved(uri)
    with connected_client(uri) as client:
        holders = {each: read_holder(client, name, each) for each in (CHAMPION, CHALLENGER)}
        for each, holder in holders.items():
            if holder is not None:
                check_comparable(name, each, holder, candidate)
        recorded, renewed = dict(holders), list[str]()
        for each, holder in holders.items():
            # A challenger that is the candidate may become champion instead.
            if holder is not None and (each == CHAMPION or holder.digest != candidate.digest):
                holders[each] = _renew_score(client, uri, name, each, holder, candidate, renewed)
        champion = holders[CHAMPION]
        if champion is not None and candidate.digest == champion.digest:
            if champion.has_files:
                unchanged = [f"models:/{name}@{CHAMPION} is already this checkpoint"]
                is_renewed = champion is not recorded[CHAMPION]
                return Promotion("; ".join(renewed if is_renewed else unchanged + renewed), is_renewed)
            alias = CHAMPION
        holder = holders[alias]
        reason = _reason_to_keep(name, alias, holder, candidate)
        if reason is None:
            number = _give_alias(client, uri, experiment, name, candidate, alias, opened)
            before = ""
            if holder is not None:
                same = holder.digest == candidate.digest
                before = ", its files were missing" if same else f", before {holder.value:.5g}"
            by = f" ({candidate.metric} by protocol {candidate.protocol_label})" if candidate.protocol else ""
            score = f"{candidate.value:.5g}{before}{by}"
            given = f"models:/{name}@{alias} is now version {number}: {score}"
            return Promotion("; ".join((*renewed, given)), True)
        if alias == CHAMPION and champion is not None and candidate.value < champion.value:
            if _reason_to_keep(name, CHALLENGER, holders[CHALLENGER], candidate) is None:
                number = _give_alias(client, uri, experiment, name, candidate, CHALLENGER, opened)
                reason += f"; models:/{name}@{CHALLENGER} is now version {number}"
        challenger = holders[CHALLENGER]
        if challenger is not None and challenger.digest == candidate.digest:
            current = _renew_score(client, uri, name, CHALLENGER, challenger, candidate, renewed)
            if alias == CHALLENGER and current is not challenger:
                return Promotion("; ".join(renewed), True)
        return Promotion("; ".join((*renewed, reason)), False)


def promote_report(
    uri: str,
    experiment: str,
    name: str,
    report: EvaluationReport,
    *,
    alias: str = CHAMPION,
    opened: LocatedCheckpoint | None = None,
) -> Promotion:
    """Promote the checkpoint of a report by its headline metric; see `promote`. A disqualified one never is."""
    if report.disqualified:
        return Promotion(f"models:/{name} stays as it is: {report.disqualified}", False)
    candidate = PromotionScore.from_report(report)
    return promote(uri, experiment, name, candidate, alias=alias, opened=opened)


def promote_checkpoint(
    checkpoint: str, name: str, *, alias: str = CHAMPION, protocol_id: str | None = None, store: str = ""
) -> Promotion:
    """Promote a checkpoint, given by any of its names, by its existing report; see `promote`.

    protocol_id: which report, if there are several. store: MLflow's URI; empty: that of the checkpoint's recipe.
    """
    opened = open_checkpoint(checkpoint, tracking_uri=store)
    (report,) = find_reports([opened.origin], protocol_id=protocol_id)
    config = checkpoint_recipe(opened)
    return promote_report(tracking_uri(store or config.tracking.uri), config.name, name, report, alias=alias)


def refuse_name(name: str) -> None:
    """Raise InvalidInput for a name that MLflow refuses for registered models, or by which it cannot find one."""
    if (allowed := clean_name(name, REGISTERED_NAME_FORBIDS)) != name or not name.strip():
        raise InvalidInput(
            f"name of a registered model: found {name!r}",
            f"one without {' '.join(REGISTERED_NAME_FORBIDS)}, which MLflow refuses",
            f"name it {allowed!r}" if name.strip() else "give a name",
        )


def rollback(uri: str, name: str, *, alias: str = CHAMPION) -> str:
    """Move an alias back to the version that held it before, and return what was done, in words.

    Raises InvalidInput if no version held it before, NotFound if there is no such alias or the earlier version has
    lost its files, and Unreachable if MLflow does not answer.
    """
    with connected_client(uri) as client:
        number = find_aliases(client, name).get(alias)
        if number is None:
            raise NotFound(
                f"models:/{name}@{alias} at {uri}: found no such alias",
                "one that `raydit promote` has given",
                f"promote a checkpoint: raydit promote CHECKPOINT --name {shlex.quote(name)}",
            )
        before = tags.previous_version(client.get_model_version(name, number).tags, alias)
        if not before:
            raise InvalidInput(
                f"models:/{name}@{alias} is version {number}, and found no version that held the alias before it",
                "one to roll back to",
                f"promote another checkpoint: raydit promote CHECKPOINT --name {shlex.quote(name)}",
            )
        earlier = find_version(client, name, before)
        if earlier is None or not has_files(client, earlier):
            raise NotFound(
                f"models:/{name}/{before}: found no files in the store",
                "those of the model, without which the alias would lead to nothing",
                "promote its checkpoint again",
            )
        client.set_registered_model_alias(name, alias, before)
    return f"models:/{name}@{alias} is version {before} again, instead of {number}"


def _reason_to_keep(name: str, alias: str, holder: PromotionScore | None, candidate: PromotionScore) -> str | None:
    """Return why the holder keeps an alias; None if the candidate gets it."""
    if holder is None:
        return None
    if candidate.digest == holder.digest:
        return f"models:/{name}@{alias} is already this checkpoint" if holder.has_files else None
    margin = math.hypot(holder.error, candidate.error)
    if candidate.value < holder.value - margin:
        return None
    reason = f"not better by more than the error of {margin:.2g}"
    if math.isinf(margin):
        reason = "and the error of a score is unknown: score both with --repeats 2 or more"
    return f"models:/{name}@{alias} stays: {holder.value:.5g} against {candidate.value:.5g}, {reason}"


def _renew_score(
    client: Any,
    uri: str,
    name: str,
    alias: str,
    holder: PromotionScore,
    candidate: PromotionScore,
    renewed: list[str],
) -> PromotionScore:
    """Give an alias to a version of the present score of its checkpoint, and return that score.

    A version keeps the score that it was made for. Append what was done, in words, to `renewed`; nothing where the
    score is the recorded one.
    """
    current = candidate if candidate.digest == holder.digest else find_current_score(holder, uri)
    if current.is_of_same_score(holder):
        return holder
    if holder.has_files:  # otherwise another version would lead to nothing, either
        version = client.get_model_version(name, find_aliases(client, name)[alias])
        model = client.get_logged_model(model_id_of(version))
        about = {tag: version.tags[tag] for tag in CHECKPOINT_TAGS if tag in version.tags}
        number = _version(client, uri, name, model, about, current)
        _move_alias(client, name, alias, number)
        renewed.append(
            f"models:/{name}@{alias} is now version {number}, the same checkpoint, scored again: {current.estimate}, "
            f"before {holder.estimate}"
        )
    return holder._replace(value=current.value, error=current.error)


def _give_alias(
    client: Any,
    uri: str,
    experiment: str,
    name: str,
    candidate: PromotionScore,
    alias: str,
    opened: LocatedCheckpoint | None,
) -> str:
    """Give the candidate's version an alias, creating the version and uploading the model's files if needed."""
    model = _logged_model(client, experiment, name, candidate)
    if opened is None or opened.is_registered_copy:
        opened = open_checkpoint(find_recorded(model.tags[tags.CHECKPOINT], candidate.digest))
    if opened.digest != candidate.digest:
        raise InvalidInput(
            f"{opened.origin}: found checkpoint {opened.digest[:12]}",
            f"{candidate.digest[:12]}, which was scored: it has been written again since",
            "score it again",
        )
    if not is_uploaded(client, model.model_id):
        upload(client, model.model_id, opened)
    if not client.search_registered_models(f"name {tags.equals(name)}"):
        client.create_registered_model(name, description=_model_description(experiment))
    about = {
        tags.CHECKPOINT: opened.origin,
        tags.VERSION_STEP: str(opened.step),
        tags.VERSION_WEIGHTS: opened.weights_sha256(),
        tags.LATENTS_FINGERPRINT: opened.record.latents_fingerprint or "unknown",
    }
    number = _version(client, uri, name, model, about, candidate)
    _move_alias(client, name, alias, number)
    if alias == CHAMPION:
        _show_picture(client, name, experiment, picture_in(model.tags.get(tags.DESCRIPTION, "")))
    challenger = read_holder(client, name, CHALLENGER)
    if alias == CHAMPION and challenger is not None and challenger.digest == candidate.digest:
        client.delete_registered_model_alias(name, CHALLENGER)
    return number


def _move_alias(client: Any, name: str, alias: str, number: str) -> None:
    """Give an alias to a version, and record which version a rollback leads to: the last one of another checkpoint."""
    before = find_aliases(client, name).get(alias, "")
    if before and before != number:
        holder, version = (client.get_model_version(name, each).tags for each in (before, number))
        if holder.get(tags.VERSION_DIGEST) == version.get(tags.VERSION_DIGEST):
            before = tags.previous_version(holder, alias)
    if before != number:
        client.set_model_version_tag(name, number, tags.previous_tag(alias), before)
    client.set_registered_model_alias(name, alias, number)


def _logged_model(client: Any, experiment: str, name: str, candidate: PromotionScore) -> Any:
    found = find_experiment(client, experiment)
    query = tags.has(tags.CHECKPOINT_DIGEST, candidate.digest)
    models = client.search_logged_models([found.experiment_id], filter_string=query) if found else []
    if not models:
        raise Unreachable(
            f"MLflow does not know the checkpoint {candidate.digest[:12]}, so {name} was not promoted: found no "
            f"LoggedModel of it in the experiment {experiment}",
            "one, which its training and its evaluation log",
            "run the same command again when the tracking server answers; if the model was deleted there, score the "
            "checkpoint again with `raydit evaluate CHECKPOINT --force`",
        )
    return models[0]


def _version(client: Any, uri: str, name: str, model: Any, about: dict[str, str], candidate: PromotionScore) -> str:
    """Return the number of the LoggedModel's version with the candidate's score, creating it if there is none.

    about: values of CHECKPOINT_TAGS.
    """
    score_tags = {tag: str(getattr(candidate, field)) for field, tag in SCORE_TAGS.items()}
    for version in client.search_model_versions(f"name {tags.equals(name)}"):
        if model_id_of(version) == model.model_id and score_tags.items() <= version.tags.items():
            return str(version.version)
    picture = picture_in(model.tags.get(tags.DESCRIPTION, ""))
    with default_store(uri):
        created = client.create_model_version(
            name,
            f"models:/{model.model_id}",
            run_id=model.source_run_id,
            tags=score_tags | {tags.PROTOCOL: candidate.protocol} | about,
            description=f"{_version_description(about, candidate)}\n\n{picture}".strip(),
            model_id=model.model_id,
        )
    known = json.loads(model.tags.get(REGISTERED_VERSIONS, "[]"))
    versions = [*known, {"name": name, "version": str(created.version)}]
    client.set_logged_model_tags(model.model_id, {REGISTERED_VERSIONS: json.dumps(versions)})
    return str(created.version)


def _model_description(experiment: str) -> str:
    return f"Checkpoints of the experiment `{experiment}`, by raydit."


def _show_picture(client: Any, name: str, experiment: str, picture: str) -> None:
    """Show the champion's picture in the description of a registered model, unless someone has written another one."""
    description = client.get_registered_model(name).description or ""
    text = description.replace(picture_in(description), "").strip() if picture_in(description) else description
    if picture and text == _model_description(experiment):
        client.update_registered_model(name, f"{text}\n\n{picture}")


def _version_description(about: dict[str, str], candidate: PromotionScore) -> str:
    """Return the description of a version in Markdown. about: values of CHECKPOINT_TAGS."""
    checkpoint = about[tags.CHECKPOINT]
    estimate = candidate.estimate.replace("+-", "±")
    score = f"{candidate.metric} {estimate} by protocol `{candidate.protocol_id}`"
    score += f" ({candidate.protocol})" if candidate.protocol else ""
    return (
        f"Step {int(about[tags.VERSION_STEP]):,}: {score}.\n\nCheckpoint `{checkpoint}`, digest "
        f"`{candidate.digest[:12]}`. Its lineage: `raydit lineage {shlex.quote(checkpoint)}`"
    )
