"""A folder that other machines do not share is found by a file that they do not see."""

import pickle

import pytest

from cluster import storage
from raydit.errors import InvalidInput


def test_a_machine_with_another_folder_of_the_same_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.storage.shared_folders.WAIT_SECONDS", 0.02)
    monkeypatch.setattr("platform.node", lambda: "node-7")
    shared = pickle.loads(pickle.dumps(storage.mark_folder(str(tmp_path / "output"))))
    shared.require()
    (tmp_path / "output").rename(tmp_path / "elsewhere")
    storage.mark_folder(str(tmp_path / "output"))  # that machine has run the same command itself
    with pytest.raises(InvalidInput, match=r"output on node-7: found another folder .* Choose a URI \(s3://BUCKET"):
        shared.require()
    assert storage.mark_folder("s3://bucket/output").mark is None
