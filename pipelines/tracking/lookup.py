"""What MLflow holds, asked for directly: runs of a job, checkpoints behind runs and models, what aliases protect."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.tracking.store import is_unavailable, mlflow_client, tracking_uri

CHECKPOINT, DIGEST = "raydit.checkpoint", "raydit.checkpoint_digest"
REMOVED = "raydit.removed"
"""Tag of a model whose checkpoint is gone from where it lay."""
BEFORE = "raydit.before"
"""Tag of a registered version: the number of the one that had its alias before it."""


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
    return [
        {
            "stage": run.data.tags.get("raydit.stage", ""),
            "status": run.info.status,
            "id": run.info.run_id,
            "link": run_link(uri, run.info.experiment_id, run.info.run_id),
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
        if is_unavailable(error):
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
    model_id = model_of(version)
    return client.get_logged_model(model_id) if model_id else None


def model_of(version) -> str | None:
    """Id of the model that a registered version is; None for one that somebody else registered otherwise."""
    source = re.fullmatch(r"models:/(m-[0-9a-f]+)", version.source or "")
    return source[1] if source else None


def protected_digests(uri: str) -> set[str]:
    """Digests of the checkpoints that an alias of any registered model points to, or would after `--rollback`.

    Whoever removes checkpoints leaves these. uri: of the store, as in a recipe. Raises ConnectionError if MLflow does
    not answer: then nobody knows, and nothing should be removed.
    """
    uri = tracking_uri(uri)
    if _is_absent(uri):
        return set()
    digests: set[str] = set()
    with connected_client(uri) as client:
        for model in _registered_models(client):
            for number in client.get_registered_model(model.name).aliases.values():
                digests |= _digests_before(client, model.name, number)
    return digests


def dangling_aliases(uri: str) -> tuple[list[str], int]:
    """Names models:/NAME@ALIAS of raydit's models whose files are gone from the store, and how many there are at all.

    Raises ConnectionError if MLflow does not answer, FileNotFoundError if there is no store.
    """
    dangling, count = [], 0
    with connected_client(uri) as client:
        for model in _registered_models(client):
            for alias, number in client.get_registered_model(model.name).aliases.items():
                version = client.get_model_version(model.name, number)
                if model_of(version) is None:
                    continue  # somebody else's, kept otherwise
                count += 1
                if not has_files(client, version):
                    dangling.append(f"models:/{model.name}@{alias}")
    return dangling, count


def has_files(client, version) -> bool:
    """Whether the model that a registered version is can be loaded from the store."""
    model_id = model_of(version)
    try:
        return bool(model_id and client.list_logged_model_artifacts(model_id))
    except Exception as error:
        if is_unavailable(error):
            raise
        return False  # the model itself was deleted


def _digests_before(client, name: str, number: str) -> set[str]:
    """Of a version, and of those that had its alias before it."""
    digests, seen = set(), set()
    while number and number not in seen:
        seen.add(number)
        tags = client.get_model_version(name, number).tags
        digests.add(tags.get("raydit.digest", ""))
        number = tags.get(BEFORE, "")
    return digests - {""}


def _registered_models(client) -> Iterator:
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def connected_client(uri: str) -> Iterator[Any]:
    """A client of a store that is there. Raises FileNotFoundError if it is not, ConnectionError if it is away."""
    if _is_absent(uri):
        raise FileNotFoundError(
            f"no MLflow store at {uri}: expected the database that a raydit command has written. Set tracking.uri or "
            "MLFLOW_TRACKING_URI to the store in use, or work where it lies"
        )
    try:
        yield mlflow_client(uri)
    except Exception as error:
        if isinstance(error, ValueError | FileNotFoundError | ConnectionError) or not is_unavailable(error):
            raise
        raise ConnectionError(f"{uri} does not answer: {_line(error)}") from error


def _is_absent(uri: str) -> bool:
    """Whether a store is a database file that nobody has made yet; to ask would make it."""
    scheme, _, database = uri.partition(":///")
    return scheme == "sqlite" and not Path(database).is_file()


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Address of a run in the UI; empty where no server shows it."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if uri.startswith("http") else ""


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
