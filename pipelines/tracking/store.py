"""The MLflow store in use: its URI, a client, and whether it answers."""

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.credentials import refuse_password
from cluster.job_package import is_job_folder
from pipelines.console import first_line
from raydit.errors import InvalidInput, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient


def tracking_uri(config_uri: str = "") -> str:
    """Return the recipe's URI, else MLFLOW_TRACKING_URI, else that of the database which plain `mlflow ui` opens here.

    Raises InvalidInput for a URI with a password, because logs, pages and jobs show it, and for a database in the
    folder of a job, which Ray deletes at the job's end.
    """
    uri = config_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    refuse_password("tracking URI", uri)
    database = database_path(uri)
    if database and is_job_folder(database):
        raise InvalidInput(
            f"tracking: found the database {database}, in a folder that Ray deletes after the job",
            "a store that outlives the job",
            "set MLFLOW_TRACKING_URI to a server that the cluster reaches, where you submit or in the cluster's "
            "environment, or set tracking.uri in the recipe",
        )
    return uri


def database_path(uri: str) -> Path | None:
    """Return the absolute path of a SQLite database; None for any other store."""
    scheme, separator, path = uri.partition(":///")
    return Path(path).absolute() if separator and scheme == "sqlite" and path else None


def absolute_uri(uri: str) -> str:
    """Return a tracking URI that means the same in every working directory."""
    database = database_path(uri)
    return f"sqlite:///{database}" if database else uri


def check_tracking(uri: str) -> str:
    """Return how many experiments a store has, in words. Raises Unreachable if it does not answer."""
    client = mlflow_client(uri)
    try:
        count = len(client.search_experiments())
    except Exception as error:
        raise unreachable(uri, error) from error
    return f"{count} experiments"


def unreachable(uri: str, error: Exception, wanted: str = "") -> Unreachable:
    """Return the error for users that stands for a failed request to a store. wanted: name that was looked up there."""
    found = f"{uri} does not answer, and {wanted} is looked up there" if wanted else f"{uri} does not answer"
    return Unreachable(
        f"{found}: {first_line(error)[:200]}", "", "start the server, or set tracking.uri to one that runs"
    )


def mlflow_client(uri: str) -> "MlflowClient":
    """Return a client that finds out within seconds that a server is down, and prints nothing of its own."""
    # MLflow's own default is to retry for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # MLflow prints two lines of links whenever a run on a server ends.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A fresh database prints a line for each of its migrations.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # urllib3 warns of every attempt to reach a server; raydit says once that it is down.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    _create_database(uri)
    from mlflow import MlflowClient

    return MlflowClient(uri)


@functools.cache
def _create_database(uri: str) -> None:
    """Create the tables of a database file, once in a process.

    MLflow creates them by dozens of migrations, and two processes that migrate at once break each other's database.
    """
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if not uri.startswith("sqlite:///") or not folder.is_dir():
        return
    from mlflow import MlflowClient

    from cluster import storage

    with storage.lock(str(folder)):
        MlflowClient(uri).search_experiments(max_results=1)


def download_model(uri: str, model_id: str, path: str, folder: Path) -> Path | None:
    """Download a file or folder of a LoggedModel into an existing folder; None if the store does not have it."""
    client = mlflow_client(uri)
    names = [file.path for file in client.list_logged_model_artifacts(model_id, str(Path(path).parent))]
    if path not in names:
        return None
    # MLflow prints a progress bar.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.artifacts import download_artifacts

    location = client.get_logged_model(model_id).artifact_location.rstrip("/")
    return Path(download_artifacts(artifact_uri=f"{location}/{path}", dst_path=str(folder), tracking_uri=uri))


def is_unavailable(error: Exception) -> bool:
    """Return whether the same request may succeed later: no answer, a busy database, a server error."""
    from requests import RequestException  # what MLflow's client speaks with; a broken file is an OSError too

    code = getattr(error, "error_code", "")
    return isinstance(error, ConnectionError | TimeoutError | RequestException) or code in (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
    )
