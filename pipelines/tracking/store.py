"""The MLflow store in use: where it is, whether it answers, and a client of it."""

import functools
import logging
import os
from pathlib import Path

from cluster.credentials import refuse_password
from cluster.temporaries import alone_in


def tracking_uri(config_uri: str = "") -> str:
    """The recipe's URI, else MLFLOW_TRACKING_URI, else the database that plain `mlflow ui` opens here."""
    uri = config_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    refuse_password("tracking URI", uri)  # logs, pages and jobs show it
    return uri


def check_tracking(uri: str) -> str:
    """How many experiments a store has. Raises ConnectionError if it does not answer."""
    client = mlflow_client(uri)
    try:
        count = len(client.search_experiments())
    except Exception as error:
        raise ConnectionError(str(error).splitlines()[0][:200]) from error
    return f"{count} experiments"


def mlflow_client(uri: str):
    # A server that is away should be found out in seconds, not in MLflow's default of minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # MLflow prints two lines of links whenever a run on a server ends.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A fresh database prints a line for each of its migrations.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That a server is away is ours to say, once; urllib3 warns of every attempt.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    _make_database(uri)
    from mlflow import MlflowClient

    return MlflowClient(uri)


@functools.cache
def _make_database(uri: str) -> None:
    """See to it that a database file has its tables, once in a process.

    MLflow makes them by dozens of migrations, and two processes that do so at once break each other's.
    """
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if not uri.startswith("sqlite:///") or not folder.is_dir():
        return
    from mlflow import MlflowClient

    with alone_in(str(folder)):
        MlflowClient(uri).search_experiments(max_results=1)


def is_unavailable(error: Exception) -> bool:
    """Whether the same call may succeed later: no answer, a busy database, a server error."""
    from requests import RequestException  # what MLflow's client speaks with; a broken file is an OSError too

    code = getattr(error, "error_code", "")
    return isinstance(error, ConnectionError | TimeoutError | RequestException) or code in (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
    )
