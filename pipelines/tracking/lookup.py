"""Lookups in MLflow: the runs of a job, the checkpoint behind a run or model, and what aliases protect."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipelines.console import first_line
from pipelines.tracking import tags
from pipelines.tracking.database import is_absent
from pipelines.tracking.moved_store import refuse_moved
from pipelines.tracking.searches import (
    all_pages,
    experiment_ids,
    find_model,
    find_run_of_id,
    find_version,
    search_runs,
)
from pipelines.tracking.store import (
    is_refusing_all,
    is_refusing_file,
    is_unavailable,
    mlflow_client,
    request_failed,
    tracking_uri,
    unreachable,
)
from raydit.errors import InvalidInput, NotFound, RayditError

MODEL_FILE = "MLmodel"
"""The file by which MLflow recognises a model."""


class CheckpointRef(NamedTuple):
    """A checkpoint that MLflow knows."""

    location: str
    """Path or URI of its folder."""
    digest: str | None
    """Digest that it must have; None if MLflow does not know it."""
    model_id: str
    """Id of its LoggedModel, which may hold a copy of it; empty if there is none."""


def runs_of_job(uri: str, job_id: str) -> list[dict[str, str]]:
    """Return the runs of all experiments that carry a Ray job's id, oldest first, with stage, status, id and link.

    link: address in the UI; empty if no server shows it. Raises Unreachable if MLflow does not answer.
    """
    try:
        client = mlflow_client(uri)
        query = tags.has(tags.JOB_ID, job_id)
        runs = list(search_runs(client, experiment_ids(client), query, "attributes.start_time"))
    except Exception as error:
        raise request_failed(uri, error) from error
    return [
        {
            "stage": run.data.tags.get(tags.STAGE, ""),
            "status": run.info.status,
            "id": run.info.run_id,
            "link": run_link(uri, run.info.experiment_id, run.info.run_id),
        }
        for run in runs
    ]


def close_runs(uri: str, runs: list[dict[str, str]]) -> int:
    """End those of a job's runs that it left open when it was killed, as KILLED, and return their number.

    runs: of a job that has ended, from `runs_of_job`. Raises Unreachable if MLflow does not answer.
    """
    left_open = [run for run in runs if run["status"] == "RUNNING"]
    try:
        for run in left_open:
            mlflow_client(uri).set_terminated(run["id"], "KILLED")
            run["status"] = "KILLED"
    except Exception as error:
        raise request_failed(uri, error) from error
    return len(left_open)


def find_checkpoint(uri: str, name: str) -> CheckpointRef:
    """Find the checkpoint behind runs:/RUN[/STEP], models:/NAME/VERSION, models:/NAME@ALIAS or models:/MODEL_ID.

    RUN: a run's id or its name. A training or a pipeline leads to its newest checkpoint, an evaluation to the one that
    it scored. uri: tracking URI as in a recipe; empty for the default store. Raises NotFound if MLflow knows no such
    checkpoint, InvalidInput for any other form of name and for a name of runs with several checkpoints, and
    Unreachable if MLflow does not answer.
    """
    kind, _, rest = name.partition(":/")
    uri = tracking_uri(uri)
    refuse_absent(uri)
    refuse_moved(uri)  # it would lead to where the checkpoint was
    client = mlflow_client(uri)
    try:
        found = _checkpoint_of_run(client, uri, rest) if kind == "runs" else _checkpoint_of_version(client, rest)
    except RayditError:
        raise
    except Exception as error:
        if is_unavailable(error):
            raise unreachable(uri, error, name) from error
        raise NotFound(
            f"found no {name} at {uri} ({first_line(error)[:200]})",
            "a run, model or version that exists there",
            "look at the store with `raydit ui`, or set tracking.uri to the store that holds it",
        ) from error
    if found is None:
        raise NotFound(
            f"{name} at {uri}: found no checkpoint behind it",
            "a run or model that raydit has logged",
            "name the folder of the checkpoint",
        )
    return found


def find_run(client: Any, uri: str, name: str) -> Any:
    """Find an MLflow run by its id, its name, or the beginning of its id. Raises NotFound or InvalidInput."""
    runs = _find_runs(client, uri, name)
    if len(runs) > 1:
        raise _several_runs(uri, name, runs)
    return client.get_run(runs[0].info.run_id)


def _find_runs(client: Any, uri: str, name: str) -> list[Any]:
    """Return all runs of a name, newest first, or the one of an id. Raises NotFound if there is none."""
    if re.fullmatch(r"[0-9a-f]{32}", name) and (run := find_run_of_id(client, name)):
        return [run]
    ids = experiment_ids(client)
    runs = list(search_runs(client, ids, f"attributes.run_name {tags.equals(name)}", "attributes.start_time DESC"))
    runs = runs or [run for run in search_runs(client, ids) if run.info.run_id.startswith(name)]
    if not runs:
        raise NotFound(f"found no run {name} at {uri}", "an id or a name", "see which there are: raydit runs list")
    return runs


def _several_runs(uri: str, name: str, runs: Sequence[Any]) -> InvalidInput:
    found = ", ".join(run.info.run_id for run in runs[:3])
    return InvalidInput(f"{name} at {uri}: found several runs ({found})", "one", "give the id of one")


def _checkpoint_of_run(client: Any, uri: str, rest: str) -> CheckpointRef | None:
    """Return the checkpoint of RUN or RUN/STEP; several runs of one name must lead to one checkpoint."""
    match = re.fullmatch(r"(.+)/(step_\d+)", rest)
    name, step = match.groups() if match else (rest, "")
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return _newest_checkpoint(client, client.get_run(name), step)
    runs = _find_runs(client, uri, name)
    found = {ref.digest or ref.location: ref for run in runs if (ref := _newest_checkpoint(client, run, step))}
    if len(found) > 1:
        raise _several_runs(uri, name, runs)
    return next(iter(found.values()), None)


def _newest_checkpoint(client: Any, run: Any, step: str) -> CheckpointRef | None:
    """Return the checkpoint with the highest step that a run or its children logged, or that of the named step.

    An evaluation has logged none if the training did: then it is the one that its tags name.
    """
    run = client.get_run(run.info.run_id)  # a search leaves out what a run has logged
    outputs = list(run.outputs.model_outputs) if run.outputs else []
    location = run.data.tags.get(tags.CHECKPOINT, "")
    if not outputs and location:
        return _scored_checkpoint(client, run) if _is_step(location, step) else None
    if not outputs:
        query = tags.has(tags.PARENT_RUN, run.info.run_id)
        children = search_runs(client, [run.info.experiment_id], query)
        outputs = [output for child in children for output in client.get_run(child.info.run_id).outputs.model_outputs]
    for output in sorted(outputs, key=lambda output: output.step, reverse=True):
        found = _checkpoint_of_model(find_model(client, output.model_id))
        if found and _is_step(found.location, step):
            return found
    return None


def _is_step(location: str, step: str) -> bool:
    return not step or location.partition("?")[0].endswith(f"/{step}")


def _scored_checkpoint(client: Any, run: Any) -> CheckpointRef:
    """Return the checkpoint that an evaluation's tags name, with the LoggedModel of its training if there is one."""
    location, digest = run.data.tags[tags.CHECKPOINT], run.data.tags.get(tags.CHECKPOINT_DIGEST)
    query = tags.has(tags.CHECKPOINT_DIGEST, digest or "")
    models = client.search_logged_models([run.info.experiment_id], filter_string=query) if digest else []
    return CheckpointRef(location, digest, models[0].model_id if models else "")


def _checkpoint_of_model(model: Any) -> CheckpointRef | None:
    """Return the checkpoint that a LoggedModel stands for; None if raydit did not log it."""
    if model is None or tags.CHECKPOINT not in model.tags:
        return None
    return CheckpointRef(model.tags[tags.CHECKPOINT], model.tags.get(tags.CHECKPOINT_DIGEST), model.model_id)


def _checkpoint_of_version(client: Any, rest: str) -> CheckpointRef | None:
    return _checkpoint_of_model(_model_of_registry(client, rest))


def _model_of_registry(client: Any, rest: str) -> Any:
    """Return the LoggedModel of m-..., NAME@ALIAS or NAME/VERSION; None if the version is not raydit's."""
    if re.fullmatch(r"m-[0-9a-f]+", rest):
        return client.get_logged_model(rest)
    name, at, alias = rest.partition("@")
    if at:
        version = client.get_model_version_by_alias(name, alias)
    else:
        name, slash, number = rest.rpartition("/")
        if not slash or not number.isdigit():
            raise InvalidInput(
                f"models:/{rest}: found a name of another form",
                "models:/NAME@ALIAS, models:/NAME/VERSION with a number, or models:/m-...",
                "correct the name",
            )
        version = client.get_model_version(name, number)
    model_id = model_id_of(version)
    return client.get_logged_model(model_id) if model_id else None


def model_id_of(version: Any) -> str | None:
    """Return the id of the LoggedModel behind a registered version; None if the version is not one of raydit's."""
    source = re.fullmatch(r"models:/(m-[0-9a-f]+)", version.source or "")
    return source[1] if source else None


def protected_digests(uri: str) -> set[str]:
    """Return the digests of checkpoints that any alias points to, or would point to after `--rollback`.

    Retention keeps these checkpoints. uri: tracking URI as in a recipe. Raises Unreachable if MLflow does not answer:
    then it is unknown what is protected, and nothing may be removed.
    """
    uri = tracking_uri(uri)
    if is_absent(uri):
        return set()
    digests: set[str] = set()
    with connected_client(uri) as client:
        for model in _registered_models(client):
            for alias, number in client.get_registered_model(model.name).aliases.items():
                digests |= _digests_with_predecessors(client, model.name, number, alias)
    return digests


def registered_digests(uri: str) -> set[str]:
    """Return the digests of the checkpoints that any registered version is a copy of, with or without an alias.

    uri: tracking URI as in a recipe. Raises Unreachable if MLflow does not answer.
    """
    uri = tracking_uri(uri)
    if is_absent(uri):
        return set()
    digests = set()
    with connected_client(uri) as client:
        for model in _registered_models(client):
            versions = client.search_model_versions(f"name {tags.equals(model.name)}")
            digests |= {version.tags.get(tags.VERSION_DIGEST, "") for version in versions}
    return digests - {""}


def dangling_aliases(uri: str) -> tuple[list[str], int]:
    """Return the aliases (models:/NAME@ALIAS) of raydit's models whose files are missing, and the number of all.

    Raises Unreachable if MLflow does not answer, and NotFound if there is no store.
    """
    dangling, count = [], 0
    with connected_client(uri) as client:
        for model in _registered_models(client):
            for alias, number in client.get_registered_model(model.name).aliases.items():
                version = client.get_model_version(model.name, number)
                if model_id_of(version) is None:
                    continue  # registered by another tool
                count += 1
                if not has_files(client, version):
                    dangling.append(f"models:/{model.name}@{alias}")
    return dangling, count


def has_files(client: Any, version: Any) -> bool:
    """Return whether the store holds all files of a registered version."""
    model_id = model_id_of(version)
    return model_id is not None and is_uploaded(client, model_id)


def is_uploaded(client: Any, model_id: str) -> bool:
    """Return whether the store holds all files of a LoggedModel, of which MODEL_FILE is uploaded last."""
    try:
        return any(file.path == MODEL_FILE for file in client.list_logged_model_artifacts(model_id))
    except Exception as error:
        if is_unavailable(error) or is_refusing_file(error):
            raise
        return False  # the model itself was deleted


def _digests_with_predecessors(client: Any, name: str, number: str, alias: str) -> set[str]:
    """Return the digests of a version and of all that held the alias before it."""
    digests, seen = set(), set()
    while number and number not in seen:
        seen.add(number)
        version = find_version(client, name, number)
        if version is None:  # no rollback can pass it
            break
        digests.add(version.tags.get(tags.VERSION_DIGEST, ""))
        number = tags.previous_version(version.tags, alias)
    return digests - {""}


def _registered_models(client: Any) -> Iterator[Any]:
    return all_pages(lambda token: client.search_registered_models(page_token=token))


def refuse_absent(uri: str) -> None:
    """Raise NotFound for a database file that does not exist."""
    if is_absent(uri):
        raise NotFound(
            f"found no MLflow store at {uri}",
            "the database that a raydit command has written",
            "name the store in use with --store, tracking.uri or MLFLOW_TRACKING_URI, or run the command in its folder",
        )


@contextmanager
def connected_client(uri: str) -> Iterator[Any]:
    """Yield a client of an existing store.

    Raises NotFound if there is none, Unreachable if it does not answer, InvalidInput if it refuses every request,
    and StorageFailed or StorageFull if its store of artifacts refuses one, or this machine's disk does.
    """
    refuse_absent(uri)
    try:
        client = mlflow_client(uri)
    except Exception as error:
        raise request_failed(uri, error) from error
    try:
        yield client
    except RayditError:
        raise
    except Exception as error:
        is_of_store = is_unavailable(error) or is_refusing_all(error) or is_refusing_file(error)
        if isinstance(error, ValueError) or not is_of_store:
            raise
        raise request_failed(uri, error) from error


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run in the UI; empty if no server shows it."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if uri.startswith("http") else ""
