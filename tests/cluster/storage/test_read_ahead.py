"""Many files are read ahead of whoever takes them, and come in order."""

import threading

import pytest

from cluster import storage
from cluster.storage import REQUESTS_AT_ONCE, opened_in_order, read_ahead


def contents(paths):
    for file in opened_in_order(paths):
        with file:
            yield file.read()


@pytest.mark.parametrize("count", [0, 1, 3 * REQUESTS_AT_ONCE + 1])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_files_come_in_the_order_in_which_they_are_named(request, tmp_path, place, count):
    folder = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_bucket")
    paths = [storage.join(folder, f"{7 * index % 50:02d}") for index in range(count)]
    for path in paths:
        storage.write_atomically(path, path.encode())
    assert [content.decode() for content in contents(paths)] == paths


def test_a_file_that_is_missing_is_told_where_it_would_come(s3_bucket):
    storage.write_atomically(f"{s3_bucket}/0", b"0")
    found = contents([f"{s3_bucket}/{index}" for index in range(3)])
    assert next(found) == b"0"
    with pytest.raises(FileNotFoundError):
        next(found)


def test_requests_to_an_object_store_go_side_by_side_and_not_further_ahead_than_said(monkeypatch):
    """None of them returns before as many as are allowed have been made."""
    together, asked = threading.Barrier(REQUESTS_AT_ONCE), []

    def opened(path):
        asked.append(path)
        together.wait(timeout=60)
        return path

    monkeypatch.setattr(read_ahead, "opened", opened)
    files = opened_in_order([f"s3://bucket/{index}" for index in range(2 * REQUESTS_AT_ONCE)])
    assert next(files) == "s3://bucket/0" and len(asked) == REQUESTS_AT_ONCE
    assert len(list(files)) == 2 * REQUESTS_AT_ONCE - 1
