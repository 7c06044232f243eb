"""Files are read in advance and come in the requested order."""

import threading

import pytest

from cluster import storage
from cluster.storage import MAX_CONCURRENT_REQUESTS, open_in_order, read_ahead


def contents(paths):
    for file in open_in_order(paths):
        with file:
            yield file.read()


@pytest.mark.parametrize("count", [0, 1, 3 * MAX_CONCURRENT_REQUESTS + 1])
@pytest.mark.parametrize("backend", ["disk", "bucket"])
def test_files_come_in_the_requested_order(request, tmp_path, backend, count):
    folder = str(tmp_path) if backend == "disk" else request.getfixturevalue("s3_bucket")
    paths = [storage.join(folder, f"{7 * index % 50:02d}") for index in range(count)]
    for path in paths:
        storage.write_atomically(path, path.encode())
    assert [content.decode() for content in contents(paths)] == paths


def test_a_missing_file_is_reported_when_its_turn_comes(s3_bucket):
    storage.write_atomically(f"{s3_bucket}/0", b"0")
    found = contents([f"{s3_bucket}/{index}" for index in range(3)])
    assert next(found) == b"0"
    with pytest.raises(FileNotFoundError):
        next(found)


def test_requests_to_an_object_store_are_concurrent_up_to_the_limit(monkeypatch):
    """No request returns before as many as are allowed have been made."""
    together, asked = threading.Barrier(MAX_CONCURRENT_REQUESTS), []

    def open_file(path):
        asked.append(path)
        together.wait(timeout=60)
        return path

    monkeypatch.setattr(read_ahead, "open_file", open_file)
    files = open_in_order([f"s3://bucket/{index}" for index in range(2 * MAX_CONCURRENT_REQUESTS)])
    assert next(files) == "s3://bucket/0" and len(asked) == MAX_CONCURRENT_REQUESTS
    assert len(list(files)) == 2 * MAX_CONCURRENT_REQUESTS - 1
