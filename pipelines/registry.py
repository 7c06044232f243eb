"""What MLflow holds, asked for directly: runs of a job, checkpoints behind runs and models, the registry's aliases."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipelines.tracking import is_away, mlflow_client, tracking_uri

CHAMPION = "champion"
"""Alias of a registered model's best version."""
CHECKPOINT, DIGEST = "raydit.checkpoint", "raydit.checkpoint_digest"


class Found(NamedTuple):
    """Where a checkpoint lies, and what it must be."""

    place: str
    digest: str | None


def runs_of_job(uri: str, experiment: str, job_id: str) -> list[dict[str, str]]:
    """Runs that carry a Ray job's id, oldest first; link is empty where no server shows them. See check_tracking."""
    client = mlflow_client(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        ids = [found.experiment_id] if found else []
        query = f"tags.`raydit.job_id` = '{job_id}'"
        runs = client.search_runs(ids, query, order_by=["attributes.start_time"]) if ids else []
    except Exception as error:
        raise ConnectionError(_line(error)) from error
    base = uri.rstrip("/") if uri.startswith("http") else ""
    return [
        {
            "stage": run.data.tags.get("raydit.stage", ""),
            "status": run.info.status,
            "id": run.info.run_id,
            "link": base and f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}",
        }
        for run in runs
    ]


def find_checkpoint(uri: str, name: str) -> Found:
    """The checkpoint behind runs:/RUN_ID[/STEP], models:/NAME/VERSION, models:/NAME@ALIAS or models:/MODEL_ID.

    uri: of the store, as in a recipe: empty for the usual one.
    Raises FileNotFoundError if MLflow knows none, ValueError for other names, ConnectionError if it does not answer.
    """
    kind, _, rest = name.partition(":/")
    uri = tracking_uri(uri)
    client = mlflow_client(uri)
    try:
        model = _of_run(client, rest) if kind == "runs" else _of_registry(client, rest)
    except Exception as error:
        if isinstance(error, FileNotFoundError | ValueError):
            raise
        if is_away(error):
            raise ConnectionError(f"{uri} does not answer, and {name} is looked up there: {_line(error)}") from error
        raise FileNotFoundError(
            f"no {name} at {uri} ({_line(error)}); expected a run, model or version that is there. Look at it with "
            "`raydit ui`, or set tracking.uri to the store that holds it"
        ) from error
    if model is None or CHECKPOINT not in model.tags:
        raise FileNotFoundError(
            f"{name} at {uri} leads to no checkpoint: expected one that raydit has told MLflow of. Name its folder"
        )
    return Found(model.tags[CHECKPOINT], model.tags.get(DIGEST))


def _of_run(client, rest: str):
    """The model with the highest step that a run made, or its children; or that of the named step."""
    run_id, _, step = rest.partition("/")
    run = client.get_run(run_id)
    outputs = list(run.outputs.model_outputs)
    if not outputs:
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        children = client.search_runs([run.info.experiment_id], query)
        outputs = [output for child in children for output in client.get_run(child.info.run_id).outputs.model_outputs]
    for output in sorted(outputs, key=lambda output: output.step, reverse=True):
        model = client.get_logged_model(output.model_id)
        if not step or model.tags.get(CHECKPOINT, "").partition("?")[0].endswith(f"/{step}"):
            return model
    return None


def _of_registry(client, rest: str):
    if re.fullmatch(r"m-[0-9a-f]+", rest):
        return client.get_logged_model(rest)
    name, at, alias = rest.partition("@")
    if at:
        version = client.get_model_version_by_alias(name, alias)
    else:
        name, slash, number = rest.rpartition("/")
        if not slash or not number.isdigit():
            raise ValueError(
                f"models:/{rest}: expected models:/NAME@ALIAS, models:/NAME/VERSION with a number, or models:/m-..."
            )
        version = client.get_model_version(name, number)
    source = re.fullmatch(r"models:/(m-[0-9a-f]+)", version.source or "")
    return client.get_logged_model(source[1]) if source else None


class Standing(NamedTuple):
    """A checkpoint's value of the metric that decides, and what makes it comparable."""

    digest: str
    protocol_id: str
    metric: str
    value: float
    error: float
    """Standard error of the value; infinite: not known."""


def promote(uri: str, experiment: str, name: str, candidate: Standing) -> tuple[str, bool]:
    """Give the candidate's model the registry's alias `champion` under `name`, if it is better than who has it.

    Better is lower by more than sqrt(error^2 + error^2). Returns what was found, in words, and whether it was given.
    Raises ValueError if the champion was chosen by another protocol or metric, and ConnectionError if MLflow does not
    answer or has not been told of the checkpoint.
    """
    client = mlflow_client(uri)
    try:
        champion = _champion(client, name)
        if champion is not None:
            decided = _compare(name, champion, candidate)
            if decided is not None:
                return decided, False
        version = _register(client, uri, experiment, name, candidate)
    except Exception as error:
        if isinstance(error, ValueError | ConnectionError) or not is_away(error):
            raise
        raise ConnectionError(f"{uri} does not answer: {name} was not promoted ({_line(error)})") from error
    before = f", before {champion.value:.5g}" if champion else ""
    return f"models:/{name}@{CHAMPION} is now version {version}: {candidate.value:.5g}{before}", True


def _compare(name: str, champion: Standing, candidate: Standing) -> str | None:
    """Why the champion stays; None if it does not."""
    if candidate.digest == champion.digest:
        return f"models:/{name}@{CHAMPION} is this checkpoint already"
    for field in ("protocol_id", "metric"):
        found, expected = getattr(candidate, field), getattr(champion, field)
        if found != expected:
            raise ValueError(
                f"--promote {name}: found a score of {field} {found}, but models:/{name}@{CHAMPION} was chosen by "
                f"{expected}; expected equal ones, or the numbers say nothing. Score both by one protocol, or "
                "promote under another name"
            )
    margin = math.hypot(champion.error, candidate.error)
    if candidate.value < champion.value - margin:
        return None
    reason = f"not better by more than the error of {margin:.2g}"
    if math.isinf(margin):
        reason = "and how sure that is nobody knows: score both with --repeats 2 or more"
    return f"models:/{name}@{CHAMPION} stays: {champion.value:.5g} against {candidate.value:.5g}, {reason}"


def _champion(client, name: str) -> Standing | None:
    """Who has the alias, by the tags of its version."""
    if not client.search_registered_models(f"name = '{name}'"):
        return None
    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return None
    tags = client.get_model_version(name, aliases[CHAMPION]).tags
    absent = [field for field in Standing._fields if f"raydit.{field}" not in tags]
    if absent:
        raise ValueError(
            f"models:/{name}@{CHAMPION} has no tag raydit.{absent[0]}: expected a version that raydit promoted. "
            "Promote under another name, or remove the alias"
        )
    kept: dict[str, Any] = {field: tags[f"raydit.{field}"] for field in Standing._fields}
    return Standing(**{**kept, "value": float(kept["value"]), "error": float(kept["error"])})


def _register(client, uri: str, experiment: str, name: str, candidate: Standing) -> str:
    """A new version with the alias."""
    found = client.get_experiment_by_name(experiment)
    query = f"tags.`{DIGEST}` = '{candidate.digest}'"
    models = client.search_logged_models([found.experiment_id], filter_string=query) if found else []
    if not models:
        raise ConnectionError(
            f"MLflow has not been told of the checkpoint {candidate.digest[:12]} yet: {name} was not promoted. Run the "
            "same command again when the tracking server answers"
        )
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {f"raydit.{field}": str(value) for field, value in candidate._asdict().items()}
    model_id = models[0].model_id
    with _default_store(uri):
        version = client.create_model_version(name, f"models:/{model_id}", tags=tags, model_id=model_id).version
    client.set_registered_model_alias(name, CHAMPION, version)
    return version


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


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
