"""Promotion in the model registry: which version is champion, which is challenger, and how to roll back."""

import math
import shlex
from typing import Any, NamedTuple

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import LocatedCheckpoint, find_recorded, open_checkpoint
from pipelines.registry.model_files import upload
from pipelines.registry.promotion_score import PromotionScore, check_comparable, find_present_score
from pipelines.registry.registered_model import RegisteredModel
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
from pipelines.scoring.protocols.protocol_file import read_protocols
from pipelines.scoring.reports.report_files import find_reports, read_report_of
from pipelines.tracking import tags
from pipelines.tracking.experiments import (
    REGISTERED_NAME_FORBIDS,
    clean_name,
    experiment_of_checkpoint,
    find_experiment,
)
from pipelines.tracking.lookup import connected_client, has_files, is_uploaded
from pipelines.tracking.model_writer import picture_in
from pipelines.tracking.moved_store import refuse_moved
from pipelines.tracking.searches import find_version
from pipelines.tracking.store import tracking_uri
from raydit.errors import InvalidInput, NotFound, Unreachable

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of a registered model: its best version, and one that scored better by less than the error."""


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
    becomes challenger instead of champion. A holder whose files are missing from the store is registered again. A
    holder is compared by its present score; if it stays, its alias moves to a version of that score.
    opened: the checkpoint; None: it is opened where MLflow has recorded it, which is not possible for weights of other
    projects that were opened with further options. Raises InvalidInput if the holder was chosen by another protocol or
    metric, NotFound if the checkpoint is gone, and Unreachable if MLflow does not answer or does not know it.
    """
    refuse_name(name)
    refuse_moved(uri)
    with connected_client(uri) as client:
        model = RegisteredModel(client, uri, name)
        recorded = {each: model.read_holder(each) for each in (CHAMPION, CHALLENGER)}
        for each, holder in recorded.items():
            if holder is not None:
                check_comparable(name, each, holder, candidate)
        holders = {each: holder and find_present_score(holder, candidate, uri) for each, holder in recorded.items()}
        if _is_held_by(holders[CHAMPION], candidate):
            alias = CHAMPION
        granted, reason = _decide(name, alias, holders, candidate)
        rescored = _rescore_holders(model, recorded, holders, granted, candidate)
        done = list(rescored.values())
        if granted:
            number = _give_alias(model, experiment, candidate, granted, opened)
            if granted == alias:
                done.append(_describe_grant(name, alias, number, holders[alias], candidate))
                return Promotion("; ".join(done), True)
            reason += f"; models:/{name}@{granted} is now version {number}"
        if alias in rescored and _is_held_by(holders[alias], candidate):
            return Promotion("; ".join(done), True)
        return Promotion("; ".join([*done, reason]), False)


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
    checkpoint: str, name: str, *, alias: str = CHAMPION, protocol: str | None = None, store: str = ""
) -> Promotion:
    """Promote a checkpoint, given by any of its names, by its existing report; see `promote`.

    protocol: which report, if there are several: its protocol's id, or a file with the protocol; a report of the
    checkpoint may lie anywhere. store: MLflow's URI; empty: that of the checkpoint's recipe.
    """
    opened = open_checkpoint(checkpoint, tracking_uri=store)
    report = None
    if protocol is not None and protocol.endswith(".json"):
        report = read_report_of(protocol, opened.digest)
        protocol = None if report else read_protocols(protocol)[0].protocol_id
    if report is None:
        (report,) = find_reports([opened.origin], protocol_id=protocol)
    config = checkpoint_recipe(opened)
    uri, experiment = tracking_uri(store or config.tracking.uri), config.name
    if opened.record.recipe is None:  # it is in the experiment of the recipe that it was evaluated by
        with connected_client(uri) as client:
            experiment = experiment_of_checkpoint(client, opened.digest) or experiment
    return promote_report(uri, experiment, name, report, alias=alias)


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
        number = RegisteredModel(client, uri, name).find_aliases().get(alias)
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


def _decide(
    name: str, alias: str, holders: dict[str, PromotionScore | None], candidate: PromotionScore
) -> tuple[str, str]:
    """Return the alias that the candidate gets, empty for none, and why it does not get the one it was meant for."""
    reason = _reason_to_keep(name, alias, holders[alias], candidate)
    if reason is None:
        return alias, ""
    champion = holders[CHAMPION]
    is_better = champion is not None and candidate.value < champion.value
    if alias == CHAMPION and is_better and _reason_to_keep(name, CHALLENGER, holders[CHALLENGER], candidate) is None:
        return CHALLENGER, reason
    return "", reason


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


def _is_held_by(holder: PromotionScore | None, candidate: PromotionScore) -> bool:
    """Return whether the candidate is the checkpoint that holds an alias."""
    return holder is not None and holder.digest == candidate.digest


def _rescore_holders(
    model: RegisteredModel,
    recorded: dict[str, PromotionScore | None],
    holders: dict[str, PromotionScore | None],
    granted: str,
    candidate: PromotionScore,
) -> dict[str, str]:
    """Move the aliases that their holders keep to versions of the present scores; return what was done, in words.

    recorded: scores that the versions were made for, by alias. holders: the present ones. granted: the alias that the
    candidate gets, empty for none.
    """
    changes = {}
    for alias, holder in holders.items():
        before = recorded[alias]
        becomes_champion = granted == CHAMPION and _is_held_by(holder, candidate)
        if holder is None or before is None or alias == granted or becomes_champion:
            continue
        if not holder.is_of_same_score(before) and holder.has_files:  # without files, no version leads anywhere
            number = model.rescore_holder(alias, holder)
            changes[alias] = (
                f"models:/{model.name}@{alias} is now version {number}, the same checkpoint, scored again: "
                f"{holder.estimate}, before {before.estimate}"
            )
    return changes


def _give_alias(
    model: RegisteredModel,
    experiment: str,
    candidate: PromotionScore,
    alias: str,
    opened: LocatedCheckpoint | None,
) -> str:
    """Give the candidate's version an alias, creating the version and uploading the model's files if needed."""
    logged_model = _find_logged_model(model, experiment, candidate)
    if opened is None or opened.is_registered_copy:
        opened = open_checkpoint(find_recorded(logged_model.tags[tags.CHECKPOINT], candidate.digest))
    if opened.digest != candidate.digest:
        raise InvalidInput(
            f"{opened.origin}: found checkpoint {opened.digest[:12]}",
            f"{candidate.digest[:12]}, which was scored: it has been written again since",
            "score it again",
        )
    if not is_uploaded(model.client, logged_model.model_id):
        upload(model.client, logged_model.model_id, opened)
    model.create_if_absent(experiment)
    checkpoint_tags = {
        tags.CHECKPOINT: opened.origin,
        tags.VERSION_STEP: str(opened.step),
        tags.VERSION_WEIGHTS: opened.weights_sha256(),
        tags.LATENTS_FINGERPRINT: opened.record.latents_fingerprint or "unknown",
    }
    number = model.add_version(logged_model, checkpoint_tags, candidate)
    model.move_alias(alias, number)
    if alias == CHAMPION:
        model.show_picture(experiment, picture_in(logged_model.tags.get(tags.DESCRIPTION, "")))
        if _is_held_by(model.read_holder(CHALLENGER), candidate):
            model.client.delete_registered_model_alias(model.name, CHALLENGER)
    return number


def _find_logged_model(model: RegisteredModel, experiment: str, candidate: PromotionScore) -> Any:
    found = find_experiment(model.client, experiment)
    query = tags.has(tags.CHECKPOINT_DIGEST, candidate.digest)
    models = model.client.search_logged_models([found.experiment_id], filter_string=query) if found else []
    if not models:
        raise Unreachable(
            f"MLflow does not know the checkpoint {candidate.digest[:12]}, so {model.name} was not promoted: found no "
            f"LoggedModel of it in the experiment {experiment}",
            "one, which its training and its evaluation log",
            "run the same command again when the tracking server answers; if the model was deleted there, score the "
            "checkpoint again with `raydit evaluate CHECKPOINT --force`",
        )
    return models[0]


def _describe_grant(
    name: str, alias: str, number: str, holder: PromotionScore | None, candidate: PromotionScore
) -> str:
    """Return in words which version has an alias now. holder: the one that had it before."""
    before = ""
    if holder is not None:
        before = ", its files were missing" if _is_held_by(holder, candidate) else f", before {holder.value:.5g}"
    by = f" ({candidate.metric} by protocol {candidate.protocol_label})" if candidate.protocol else ""
    return f"models:/{name}@{alias} is now version {number}: {candidate.value:.5g}{before}{by}"
