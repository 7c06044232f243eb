"""Files that are being written on a local disk: temporary names, locks, full disks, and what killed processes left."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.storage.paths import nearest_folder
from raydit.errors import StorageFull

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the names of files and folders that are not finished."""
STALE_AFTER_SECONDS = 24 * 3600
"""Age at which a temporary file of another host counts as abandoned."""


@contextlib.contextmanager
def temporary_path(folder: str, num_bytes: int) -> Iterator[str]:
    """Provide an unused path inside a folder; a file or folder that is still there at the end is removed.

    num_bytes: the size of what is written, for the error message. Raises StorageFull when there is no space left.
    """
    name = f"{TEMPORARY_PREFIX}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = os.path.join(folder, name)
    with raise_storage_full(folder, num_bytes):
        try:
            yield temporary
        finally:
            _remove(temporary)  # before the error is explained, so that our own incomplete file does not count


@contextlib.contextmanager
def raise_storage_full(folder: str, num_bytes: int | None = None) -> Iterator[None]:
    """Replace the error of a full disk or an exhausted quota with StorageFull.

    folder: where the block writes. num_bytes: how much it writes, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = "no space left" if error.errno == errno.ENOSPC else "disk quota exceeded"
        free = shutil.disk_usage(nearest_folder(folder)).free
        raise StorageFull(
            f"{folder}: {reason} ({free:,} bytes are free)",
            f"room for {num_bytes:,} bytes" if num_bytes else "",
            "free some space there and run the same command again, or use a path on another disk",
        ) from error


@contextlib.contextmanager
def lock(path: str) -> Iterator[None]:
    """Hold an exclusive lock on an existing file or folder, for which other processes of this machine wait.

    A file system without locks of folders (some versions of NFS) lets several processes in at the same time.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_stale(folder: Path) -> list[str]:
    """Remove the temporary files and folders that killed processes left directly inside a folder; return their names.

    Stale is what belongs to a process of this host that no longer runs, or is older than a day.
    """
    stale = [entry for entry in folder.iterdir() if _is_stale(entry)]
    for entry in stale:
        _remove(str(entry))
    return sorted(entry.name for entry in stale)


def _is_stale(entry: Path) -> bool:
    match = re.fullmatch(re.escape(TEMPORARY_PREFIX) + r"(.+)-(\d+)-[0-9a-f]{8}", entry.name)
    if not match:
        return False
    host, process_id = match.groups()
    if host == platform.node() and not psutil.pid_exists(int(process_id)):
        return True
    with contextlib.suppress(FileNotFoundError):  # its owner may rename it at any moment
        return time.time() - entry.stat().st_mtime > STALE_AFTER_SECONDS
    return False


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
