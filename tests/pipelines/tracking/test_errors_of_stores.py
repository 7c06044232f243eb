"""Which errors of a store pass with time, and what becomes of the others."""

import errno
import os

import pytest
import requests
from boto3.exceptions import S3UploadFailedError
from botocore import exceptions as botocore
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from pipelines.tracking import lookup
from pipelines.tracking.lookup import connected_client, find_checkpoint, is_uploaded
from pipelines.tracking.store import is_unavailable
from raydit.errors import NotFound, StorageFailed, StorageFull, Unreachable


def os_error(number):
    return OSError(number, os.strerror(number), "mlruns/1/artifacts")


def http_error(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} of a proxy", response=response)


def client_error(status):
    answer = {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.ClientError(answer, "PutObject")


def upload_error(status):
    """As boto3 raises it."""
    try:
        try:
            raise client_error(status)
        except botocore.ClientError as error:
            raise S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904
    except S3UploadFailedError as error:
        return error


PASSING = [
    *map(os_error, (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ECONNREFUSED)),
    *map(http_error, (408, 429, 500, 503)),
    *map(client_error, (500, 503)),
    upload_error(503),
    requests.ConnectionError("down"),
    botocore.EndpointConnectionError(endpoint_url="http://s3"),
    botocore.ConnectTimeoutError(endpoint_url="http://s3"),
    botocore.ReadTimeoutError(endpoint_url="http://s3"),
    MlflowException("no space", error_code=TEMPORARILY_UNAVAILABLE),
]
LASTING = [
    *map(os_error, (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)),
    *map(http_error, (400, 403, 413)),
    client_error(403),
    upload_error(403),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_an_outage_is_waited_for(error):
    assert is_unavailable(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_does_not_pass_with_time_is_not_waited_for(error):
    assert not is_unavailable(error)


@pytest.fixture
def existing(tmp_path, monkeypatch):
    """A store that nothing is asked of."""
    monkeypatch.setattr(lookup, "mlflow_client", lambda uri: None)
    return "http://store"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (http_error(413), StorageFailed),
        (upload_error(403), StorageFailed),
        (os_error(errno.ENOTDIR), StorageFailed),
        (upload_error(503), Unreachable),
        (os_error(errno.EIO), Unreachable),
    ],
    ids=repr,
)
def test_what_a_store_of_artifacts_refuses_is_an_error_for_users(existing, error, kind):
    with pytest.raises(kind, match="http://store"), connected_client(existing):
        raise error


@pytest.mark.parametrize(
    ("number", "kind", "do"),
    [(errno.ENOSPC, StorageFull, "Free some space"), (errno.EACCES, StorageFailed, "Give yourself permission")],
)
def test_a_disk_that_is_full_or_protected_is_not_taken_for_the_store(existing, number, kind, do):
    """The temporary folder's, as when a model is prepared."""
    with pytest.raises(kind, match=rf"Errno {number}.*mlruns/1/artifacts.*{do}"), connected_client(existing):
        raise os_error(number)


def test_files_that_cannot_be_listed_are_not_taken_for_missing(existing):
    class Client:
        def list_logged_model_artifacts(self, model_id):
            raise http_error(403)

    with pytest.raises(requests.HTTPError):
        is_uploaded(Client(), "m-1")


def test_a_mistyped_name_creates_no_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("runs:/typo", "models:/typo@champion"):
        with pytest.raises(NotFound, match="found no MLflow store at sqlite:///"):
            find_checkpoint("", name)
    assert not list(tmp_path.iterdir())
