"""What a disk or a store refuses is one error for users, with the path as it was given."""

import os

import pytest

from cluster import storage
from cluster.storage.lease import hold_folder
from raydit.errors import NotFound, StorageFailed


@pytest.fixture
def blocked(tmp_path):
    """Return a path below a file, which no folder can have: refused for every user, root as well."""
    (tmp_path / "file").write_text("not a folder")
    return str(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "use",
    [
        lambda path: storage.write_atomically(path, b"content"),
        lambda path: storage.read_bytes(os.path.dirname(path) + "/.."),
        lambda path: hold_folder(path, on_lost=print).__enter__(),
    ],
    ids=["write", "read", "lease"],
)
def test_a_refusal_names_the_path_and_says_what_to_do(blocked, use):
    with pytest.raises(StorageFailed, match=r"file.*: .*\. Check that it exists, and that you may read and write it"):
        use(blocked)


def test_a_missing_file_is_not_a_failure_of_the_disk(tmp_path):
    with pytest.raises(NotFound, match="missing does not exist, expected a file"):
        storage.read_bytes(str(tmp_path / "missing"))
