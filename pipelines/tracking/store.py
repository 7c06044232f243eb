"""The MLflow store in use: its URI, a client, and whether it answers."""

import errno
import functools
import logging
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.credentials import refuse_password
from cluster.environment import environment_variable
from cluster.job_package import is_job_folder
from pipelines.console import first_line
from pipelines.tracking.database import SQLITE, database_folder, database_path, is_absent
from pipelines.tracking.moved_store import refuse_moved
from raydit.errors import DISK_REMEDIES, InvalidInput, RayditError, StorageFailed, StorageFull, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient

OTHER_SCHEMA = "out-of-date database schema"
"""In MLflow's message about a database whose tables are those of another version."""
TEMPORARY_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")
"""MLflow's codes of requests that may succeed later. Any failure without a code of its own is an internal error."""
LASTING_ERRNOS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
)
"""Numbers of the system's errors that waiting does not correct: wrong permissions, and what is in a file's way."""
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Environment variables that MLflow sends to the tracking server."""
DENIED_CODES = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")


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


def gets_credentials(uri: str) -> bool:
    """Return whether MLflow would send credentials to a server other than that of MLFLOW_TRACKING_URI."""
    is_server = uri.startswith(("http://", "https://"))
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return is_server and any(map(os.environ.get, CREDENTIALS)) and urlsplit(uri)[:2] != urlsplit(known)[:2]


def check_tracking(uri: str) -> str:
    """Return how many experiments a store has, in words.

    Raises Unreachable if it does not answer, and InvalidInput if it never will take runs.
    """
    try:
        count = len(mlflow_client(uri).search_experiments())
    except RayditError:
        raise
    except Exception as error:
        raise request_failed(uri, error) from error
    return f"{count} experiments"


def refuse_unusable(uri: str) -> None:
    """Raise InvalidInput if a store will never take runs: another kind of store, a wrong password, a moved database.

    A store that does not answer now is not refused, because it may answer later. A database that does not exist yet is
    not created.
    """
    _refuse_read_only(uri)
    if is_absent(uri):
        return
    refuse_moved(uri)
    try:
        mlflow_client(uri).search_experiments(max_results=1)
    except RayditError:
        raise
    except Exception as error:
        if not is_unavailable(error):
            raise unusable(uri, error) from error


def _refuse_read_only(uri: str) -> None:
    """Raise InvalidInput for a database file that cannot be written, or that cannot be created in its folder."""
    folder = database_folder(uri)
    if folder is None:
        return
    file = folder / Path(uri).name
    target = file if file.exists() else folder
    if not os.access(target, os.W_OK):
        raise InvalidInput(
            f"tracking.uri: found {uri}, and {target} cannot be written",
            "a database that can be written, or a folder in which it can be created",
            "set tracking.uri or MLFLOW_TRACKING_URI to another store, or correct the permissions",
        )


def unusable(uri: str, error: Exception) -> InvalidInput:
    """Return the error for users that stands for a store which will never take runs, whatever is waited for."""
    reason = first_line(error)[:200]
    if uri.startswith("file:") or "://" not in uri:
        found, do = "MLflow does not write runs to folders any more", f"set it to a database: {SQLITE}PATH/mlflow.db"
    elif is_denied(error):
        found = f"the server refuses access: {reason}"
        do = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what it accepts"
    elif OTHER_SCHEMA in str(error):
        found = f"its tables are another MLflow version's: {reason}"
        do = f"copy the database, then run: mlflow db upgrade {uri}"
    else:
        found, do = reason, "set tracking.uri or MLFLOW_TRACKING_URI to a database, or to an MLflow server"
    return InvalidInput(f"tracking.uri: {uri} cannot be used ({found})", "a store that takes runs", do)


def request_failed(uri: str, error: Exception, wanted: str = "") -> RayditError:
    """Return the error for users that stands for a failed request to a store. wanted: name that was looked up there."""
    if isinstance(error, OSError) and error.errno in DISK_REMEDIES:  # of temporary files, or of artifacts beside it
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageFailed
        return kind(str(error), "", f"{DISK_REMEDIES[error.errno]}, and run the same command again")
    if is_unavailable(error):
        return unreachable(uri, error, wanted)
    if is_refusing_file(error):
        found = f"the artifact store of {uri} refuses a file: {first_line(error)[:200]}"
        return StorageFailed(found, "", "correct its permissions or limits, and run the same command again")
    return unusable(uri, error)


def unreachable(uri: str, error: Exception, wanted: str = "") -> Unreachable:
    """Return the error for users that stands for a failed request to a store. wanted: name that was looked up there."""
    found = f"{uri} does not answer, and {wanted} is looked up there" if wanted else f"{uri} does not answer"
    return Unreachable(
        f"{found}: {first_line(error)[:200]}", "", "start the server, or set tracking.uri to one that runs"
    )


def mlflow_client(uri: str) -> "MlflowClient":
    """Return a client that finds out within seconds that a server is down, and prints nothing of its own.

    Creates the tables of a database that does not exist yet.
    """
    # MLflow's own default is to retry for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # MLflow prints two lines of links whenever a run on a server ends.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A fresh database prints a line for each of its migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A busy database prints its traceback before it raises the error, which raydit reports in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
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
    folder = database_folder(uri)
    if folder is None or not folder.is_dir():
        return
    from mlflow import MlflowClient

    from cluster import storage

    with storage.lock(str(folder)):
        MlflowClient(uri).search_experiments(max_results=1)


def default_store(uri: str) -> AbstractContextManager[None]:
    """Set MLflow's default store for a block: a registry in a database looks models up there, not in the client's."""
    return environment_variable("MLFLOW_TRACKING_URI", uri)


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
    """Return whether the same request may succeed later: no answer, a busy database, a server error, a full disk."""
    from requests import RequestException  # what MLflow's client speaks with
    from sqlalchemy.exc import OperationalError  # MLflow lets some of a database's errors through

    if isinstance(error, RequestException) and error.response is not None:  # the artifacts' server, or its proxy
        return _is_temporary(error.response.status_code)
    if isinstance(error, ConnectionError | TimeoutError | RequestException | OperationalError):
        return True
    if _is_foreign(error) or is_denied(error):
        return False
    if (is_away := _is_s3_away(error)) is not None:
        return is_away
    if isinstance(error, OSError):  # artifacts beside the database; a broken picture is an OSError without a number
        return error.errno is not None and error.errno not in LASTING_ERRNOS
    return getattr(error, "error_code", "") in TEMPORARY_CODES and OTHER_SCHEMA not in str(error)


def _is_temporary(status: int) -> bool:
    """Return whether a request that was answered by an HTTP status may succeed later."""
    return status in (408, 429) or not 400 <= status < 500


def _is_s3_away(error: Exception) -> bool | None:
    """Return whether a bucket of artifacts may take later what it did not take now; None for an error of another kind.

    boto3's errors of an upload name no cause but the one that they were raised from.
    """
    botocore = sys.modules.get("botocore.exceptions")  # not loaded if no artifacts lie in a bucket
    if botocore is None:
        return None
    for each in (error, error.__cause__ or error.__context__):
        if isinstance(each, botocore.ConnectionError | botocore.HTTPClientError):
            return True
        if isinstance(each, botocore.ClientError):
            return _is_temporary(each.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    return None


def is_refusing_file(error: Exception) -> bool:
    """Return whether a failed request was to a store of artifacts, which answered: a folder, a server or a bucket."""
    from requests import RequestException

    if isinstance(error, RequestException):
        return error.response is not None
    if isinstance(error, OSError):
        return error.errno in LASTING_ERRNOS
    return _is_s3_away(error) is not None


def is_database_failing(error: Exception) -> bool:
    """Return whether a database that answers cannot do what was asked, as when its disk is full."""
    from sqlalchemy.exc import OperationalError

    return isinstance(error, OperationalError) or getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE"


def is_denied(error: Exception) -> bool:
    """Return whether a server refused access: HTTP 401 or 403."""
    if getattr(error, "error_code", "") in DENIED_CODES:
        return True
    # A proxy's own answer in JSON has no code that MLflow knows, and MLflow forgets its status.
    answer = getattr(error, "json", {})
    denied = ("unauthorized", "unauthenticated", "forbidden", "credentials", "access denied")
    return "error_code" not in answer and any(word in str(answer).lower() for word in denied)


def is_refusing_all(error: Exception) -> bool:
    """Return whether a store that worked refuses every request now: access is denied, or another server answers."""
    if is_denied(error) or _is_foreign(error) or OTHER_SCHEMA in str(error):
        return True
    return getattr(error, "error_code", "") == "ENDPOINT_NOT_FOUND"


def _is_foreign(error: Exception) -> bool:
    """Return whether what answers is no MLflow server."""
    return "not in a valid JSON format" in str(error)


def is_gone(error: Exception) -> bool:
    """Return whether what a request was about does not exist, or was deleted."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


def is_locked(error: Exception) -> bool:
    """Return whether another process holds a database's lock, which it may do for any time."""
    return "database is locked" in str(error)
