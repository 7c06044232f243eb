"""Temporary names on a disk: what is being written has one until it is whole; what a killed process left is removed."""

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

TEMPORARY_PREFIX = ".tmp-"
STALE_AFTER_SECONDS = 24 * 3600


class StorageFull(OSError):
    """The disk or quota has no room left for what was being written."""


@contextlib.contextmanager
def temporary_in(folder: str, num_bytes: int) -> Iterator[str]:
    """A temporary name inside a folder, gone afterwards unless renamed; ENOSPC becomes StorageFull."""
    name = f"{TEMPORARY_PREFIX}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = os.path.join(folder, name)
    try:
        yield temporary
    except OSError as error:
        _remove(temporary)  # first, so that what is free does not count our own half
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"no room left in {folder}: {num_bytes:,} bytes were to be written, "
                f"{shutil.disk_usage(folder).free:,} are free; free some space or choose another output"
            ) from error
        raise
    finally:
        _remove(temporary)


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """One process of this machine at a time; on a disk that knows no locks of folders (NFS) perhaps several."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_stale(folder: Path) -> list[str]:
    """Remove what killed processes left half-written directly inside a folder, and return the names.

    Stale is what belongs to a process of this host that is gone, or is older than a day.
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
    if host == platform.node() and not is_running(int(process_id)):
        return True
    with contextlib.suppress(FileNotFoundError):  # its owner may rename it at any moment
        return time.time() - entry.stat().st_mtime > STALE_AFTER_SECONDS
    return False


def is_running(process_id: int) -> bool:
    """Whether a process of this machine is there, whoever's it is."""
    try:
        os.kill(process_id, 0)  # signal 0 asks only whether the process is there
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
