"""What a disk or a store refuses is one error for users, with the path as it was given."""

import os

import pytest

from cluster import storage
from cluster.storage.lease import hold_folder
from raydit.errors import InvalidInput, NotFound, StorageFailed


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
    ],
    ids=["write", "read"],
)
def test_a_refusal_names_the_path_and_says_what_to_do(blocked, use):
    with pytest.raises(StorageFailed, match=r"file.*: .*\. Check that it exists, and that you may read and write it"):
        use(blocked)


CREATORS = {
    "lease": lambda path: hold_folder(path, on_lost=print).__enter__(),
    "check": lambda path: storage.refuse_unwritable(os.path.join(path, "file.png")),
}


@pytest.mark.parametrize("create", CREATORS.values(), ids=CREATORS)
def test_a_file_where_a_folder_is_to_be_is_named(blocked, create):
    with pytest.raises(InvalidInput, match="below: found a file at .*/file, expected a folder.* Choose another path"):
        create(blocked)


@pytest.mark.parametrize("create", CREATORS.values(), ids=CREATORS)
def test_a_folder_in_which_nothing_can_be_created_is_refused(create):
    """Nobody can, not even root; Linux says that the file does not exist."""
    with pytest.raises(StorageFailed, match=r"/proc/raydit.*: .*Check that it exists, and that you may read and write"):
        create("/proc/raydit")


@pytest.mark.parametrize("path", ["a/b/grid.png", "grid.png"])
def test_the_check_of_a_writable_path_leaves_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    storage.refuse_unwritable(path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_a_failure_of_the_disk(tmp_path):
    with pytest.raises(NotFound, match="missing does not exist, expected a file"):
        storage.read_bytes(str(tmp_path / "missing"))
