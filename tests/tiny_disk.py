"""A disk that fills at once, for the tests of full disks."""

import os
import subprocess

import pytest


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB."""
    mount_point = tmp_path / "tiny"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tiny tmpfs needs root and the right to mount")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)
