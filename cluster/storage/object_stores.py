"""Clients of object stores: one for each bucket, which retries the requests that the store throttles.

Credentials and endpoints come from the environment of pyarrow.fs (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

import contextlib
import functools
import os
import random
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TypeVar

from pyarrow.fs import AwsDefaultS3RetryStrategy, FileInfo, FileSystem, S3FileSystem

MAX_RETRIES = 12
"""Retries of a request to S3 that is throttled or fails: the first at once, the n-th of the others after a pause of
25 ms * 2^n, which makes 102 s for all twelve."""
MAX_PAUSE_SECONDS = 20.0
THROTTLED_READ_ERROR = "Failed to flush response stream"
"""Arrow reads a file into memory of the size that was requested. A throttling response that is longer than a small
file does not fit there, which is an error that the client itself does not retry."""

MAX_COPY_BYTES = 5_000_000_000
"""Largest file that S3 copies in one request. The optimizer state of a DiT-XL/2 is larger."""
COPY_BUFFER_BYTES = 16 * 2**20

Result = TypeVar("Result")


def resolve_in_bucket(uri: str) -> tuple[FileSystem, str] | None:
    """Return the client for a URI in a bucket and the path BUCKET/KEY; None for a URI of another kind."""
    url = urllib.parse.urlsplit(uri)
    if url.scheme not in ("s3", "gs", "gcs"):
        return None
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_"))}
    client = _client(f"{url.scheme}://{url.netloc}?{url.query}", frozenset(environment.items()))
    bucket = url.netloc.rpartition("@")[2]
    # pyarrow opens no key with an empty part, so what was typed as // means /.
    return client, re.sub("/+", "/", bucket + urllib.parse.unquote(url.path)).rstrip("/")


@functools.lru_cache(maxsize=32)
def _client(bucket: str, environment: frozenset[tuple[str, str]]) -> FileSystem:
    """Create the client of a bucket, which takes 50 ms.

    environment: the variables that the client reads, so that a change of them leads to another client.
    """
    filesystem, _ = FileSystem.from_uri(bucket)
    if not isinstance(filesystem, S3FileSystem):
        return filesystem  # Google's client itself retries for minutes
    # pyarrow takes no retry strategy with a URI, and its default retries five times a second for only six seconds.
    _, (options,) = filesystem.__reduce__()
    # Not the AWS SDK's standard strategy: that has a budget for the life of the process, from which each throttled
    # request takes more than a successful one gives back. After about 100 of them, it retries nothing any more.
    strategy = AwsDefaultS3RetryStrategy(max_attempts=MAX_RETRIES)
    return S3FileSystem(**{**options, "retry_strategy": strategy, "allow_delayed_open": True})


def copy_in_store(filesystem: FileSystem, source: FileInfo, destination: str) -> None:
    """Copy a file within an object store: by one request, or through this machine if it is too large for that."""
    if source.size <= MAX_COPY_BYTES:
        filesystem.copy_file(source.path, destination)
        return
    with filesystem.open_input_stream(source.path) as read, removed_on_failure(filesystem, destination):
        with filesystem.open_output_stream(destination) as written:
            shutil.copyfileobj(read, written, COPY_BUFFER_BYTES)


@contextlib.contextmanager
def removed_on_failure(filesystem: FileSystem, destination: str) -> Iterator[None]:
    """Remove the file that a block writes if the block fails, also by an interrupt.

    Closing a stream to an object store completes the upload of what was written until then, and pyarrow cannot abort
    it: a truncated file would appear under its final name.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(destination)
        raise


def retry_throttled(read: Callable[[], Result]) -> Result:
    """Call `read` and return its result; call it again if it fails because an object store throttled the request."""
    for attempt in range(MAX_RETRIES):
        try:
            return read()
        except OSError as error:
            if THROTTLED_READ_ERROR not in str(error):
                raise
        time.sleep(random.uniform(0, min(2.0**attempt, MAX_PAUSE_SECONDS)))
    return read()
