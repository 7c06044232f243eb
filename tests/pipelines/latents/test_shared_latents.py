"""A worker whose machine does not share the folder of the latents is found before anything is encoded."""

import pytest
from tiny_encode import recipe

from cluster import storage
from pipelines.latents.encoding import ReadImages, WriteShard
from pipelines.training.data.image_files import write_image_file
from raydit.errors import InvalidInput


def test_workers_read_and_write_nothing_without_the_folder_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.storage.shared_folders.WAIT_SECONDS", 0.0)
    images, folder, other = recipe(tmp_path).images, str(tmp_path / "latents"), storage.SharedFolder(str(tmp_path), "x")
    for work in (
        lambda: ReadImages(images, other)({}),
        lambda: WriteShard(folder, None, shared=other)({}),
        lambda: write_image_file(images, f"{folder}/0.u8", [], None, False, other),
    ):
        with pytest.raises(InvalidInput, match="found another folder than on the machine that runs the command"):
            work()
    assert not storage.exists(folder)
