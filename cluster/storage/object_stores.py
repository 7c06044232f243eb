"""Clients of object stores: one for each bucket, which waits and asks again where the store asks for patience.

Credentials and endpoints come from the environment of pyarrow.fs (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

import functools
import os
import random
import shutil
import time
import urllib.parse
from collections.abc import Callable
from typing import TypeVar

from pyarrow.fs import AwsStandardS3RetryStrategy, FileInfo, FileSystem, S3FileSystem

ATTEMPTS = 10
"""Of every request to S3 that is throttled or meets a fault: a minute and a half, with growing random pauses."""
LONGEST_PAUSE_SECONDS = 20.0
BROKEN_BY_REFUSAL = "Failed to flush response stream"
"""Arrow reads into memory of the size asked for; a refusal that is longer than a small file does not fit, and is then
an error of its own that the client does not try again."""

LARGEST_COPY = 5_000_000_000
"""Bytes that S3 copies in one request. The optimizer of a DiT-XL/2 is larger."""
COPIED_AT_ONCE = 16 * 2**20

Result = TypeVar("Result")


def resolve_in_bucket(uri: str) -> tuple[FileSystem, str] | None:
    """The client for a URI in a bucket, and BUCKET/KEY; None if it is of another kind of store."""
    url = urllib.parse.urlsplit(uri)
    if url.scheme not in ("s3", "gs", "gcs"):
        return None
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_"))}
    client = _client(f"{url.scheme}://{url.netloc}?{url.query}", frozenset(environment.items()))
    bucket = url.netloc.rpartition("@")[2]
    return client, (bucket + urllib.parse.unquote(url.path)).rstrip("/")


@functools.lru_cache(maxsize=32)
def _client(bucket: str, environment: frozenset[tuple[str, str]]) -> FileSystem:
    """environment: what the client reads of it; another one needs another client. To make one takes 50 ms."""
    filesystem, _ = FileSystem.from_uri(bucket)
    if not isinstance(filesystem, S3FileSystem):
        return filesystem  # Google's own retries for minutes
    # With a URI pyarrow takes no retry strategy; its own asks five times a second and gives up after six seconds.
    _, (options,) = filesystem.__reduce__()
    strategy = AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return S3FileSystem(**{**options, "retry_strategy": strategy, "allow_delayed_open": True})


def copy_in_store(filesystem: FileSystem, source: FileInfo, destination: str) -> None:
    """Copy a file within a store: by the store itself, or through this machine where it is too large for that."""
    if source.size <= LARGEST_COPY:
        filesystem.copy_file(source.path, destination)
        return
    with filesystem.open_input_stream(source.path) as read, filesystem.open_output_stream(destination) as written:
        shutil.copyfileobj(read, written, COPIED_AT_ONCE)


def patiently(read: Callable[[], Result]) -> Result:
    """What `read` returns, called again where a throttled request broke it off."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return read()
        except OSError as error:
            if BROKEN_BY_REFUSAL not in str(error):
                raise
        time.sleep(random.uniform(0, min(2.0**attempt, LONGEST_PAUSE_SECONDS)))
    return read()
