"""Atomic writing of files, also on a full disk."""

import errno
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dit.files import publish, require_unused, translate_full_disk
from raydit.errors import InvalidInput


def test_a_full_disk_is_an_oserror_with_the_path(tiny_disk):
    file = tiny_disk / "weights.safetensors"
    with pytest.raises(OSError, match="No space left.*weights") as refused, translate_full_disk(file):
        save_file({"w": torch.zeros(1_000_000)}, file)
    assert refused.value.errno == errno.ENOSPC


def test_other_errors_are_not_translated(tmp_path):
    file = tmp_path / "nowhere" / "weights.safetensors"
    with pytest.raises(SafetensorError), translate_full_disk(file):
        save_file({"w": torch.zeros(1)}, file)


def test_leftovers_of_killed_writers_are_removed_and_files_of_running_ones_kept(tmp_path):
    host = platform.node()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living = (tmp_path / f".tmp-step_1-{host}-{process}" for process in (dead.pid, os.getppid()))
    for folder in (left, living):
        folder.mkdir()
        (folder / "half").touch()
    publish(tmp_path / "step_2", lambda folder: folder.mkdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [living.name, "step_2"]
    assert (living / "half").exists()


def test_leftovers_of_other_hosts_are_removed_a_day_after_their_last_change(tmp_path):
    lost, written, other = (
        tmp_path / f".tmp-{name}" for name in ("step_10-pod-a-7", "step_30-pod-b-7", "step_x-pod-a-7")
    )
    for folder in (lost, written, other):
        (folder / "trainer").mkdir(parents=True)
        (folder / "trainer" / "half").touch()
        for entry in (folder / "trainer" / "half", folder / "trainer", folder):
            os.utime(entry, (0, time.time() - 25 * 3600))
    (written / "trainer" / "half").write_text("more")
    publish(tmp_path / "step_20", lambda folder: folder.mkdir())
    assert {*tmp_path.iterdir()} == {written, other, tmp_path / "step_20"}


def test_a_leftover_that_cannot_be_removed_does_not_fail_the_write(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".tmp-step_1-{platform.node()}-{dead.pid}").mkdir()

    def refuse(path):
        raise PermissionError(errno.EPERM, "not ours", str(path))

    monkeypatch.setattr("dit.files.shutil.rmtree", refuse)
    publish(tmp_path / "step_2", lambda folder: folder.mkdir())
    assert (tmp_path / "step_2").is_dir()


def test_two_processes_can_write_the_same_path(tmp_path):
    other_process = (
        "import sys; from pathlib import Path; from dit.files import publish\n"
        "publish(Path(sys.argv[1]), lambda folder: (folder.mkdir(), (folder / 'file').write_text('second')))"
    )

    def write(folder):
        folder.mkdir()
        (folder / "file").write_text("first")
        subprocess.run([sys.executable, "-c", other_process, tmp_path / "step"], check=True)
        assert (tmp_path / "step" / "file").read_text() == "second"

    publish(tmp_path / "step", write)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]
    assert (tmp_path / "step" / "file").read_text() == "first"


def test_a_link_to_an_empty_folder_leads_to_what_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to("disk")
    publish(require_unused(link), lambda folder: (folder.mkdir(), (folder / "file").write_text("new")))
    assert link.is_symlink() and (tmp_path / "disk" / "file").read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "out"]


def test_an_empty_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path):
        with pytest.raises(InvalidInput, match="is the working directory, expected a path .* Name a new folder"):
            require_unused(path)
    (tmp_path / "volume").mkdir()
    assert require_unused("volume").name == "volume"
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(InvalidInput, match="volume is a mount point, expected a path"):
        require_unused("volume")


@pytest.mark.parametrize("uri", ["s3://bucket/xl2.pt", "file:///models/xl2.pt"])
def test_a_uri_is_not_taken_for_a_folder_named_after_its_scheme(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=f"{uri} is a URI, expected a path on this machine"):
        require_unused(uri)
