"""Atomic writing of files and folders, protection of existing files, and digests."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from raydit.errors import AlreadyExists, InvalidInput

ABANDONED_AFTER_SECONDS = 24 * 3600
"""Time since its last change after which an unfinished file of another host counts as abandoned."""


@contextlib.contextmanager
def translate_full_disk(path: Path) -> Iterator[None]:
    """Raise OSError (ENOSPC) where safetensors, whose errors have no errno, finds the disk of `path` full."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def require_unused(path: str | Path) -> Path:
    """Return the path if it does not exist or is an empty folder; of a link to one, the path of that folder.

    Raises AlreadyExists otherwise, and InvalidInput for a URI or an empty folder that `publish` could not replace.
    """
    if "://" in str(path):
        raise InvalidInput(
            f"{path} is a URI", "a path on this machine", "name a path, and copy what is written there to the store"
        )
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise AlreadyExists(f"{path} exists already", "a new path", "choose another path, or move this one away")
    if not path.is_dir():
        return path
    folder = path.resolve()
    if folder.samefile(os.curdir) or folder.is_mount():
        kind = "a mount point" if folder.is_mount() else "the working directory"
        raise InvalidInput(
            f"{path} is {kind}", "a path at which a finished folder can be put", "name a new folder inside it"
        )
    return folder if path.is_symlink() else path


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file or folder atomically: call `write` with a temporary path next to `path`, then rename it.

    Whatever exists at `path` is replaced only by the rename. A failed `write` leaves nothing behind; what killed
    processes left is removed by `remove_leftovers`. If two processes write the same path, the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f".tmp-{path.name}-{platform.node()}-{os.getpid()}")
    _remove(temporary)
    try:
        with translate_full_disk(path):
            write(temporary)
        if path.is_dir():
            shutil.rmtree(path)  # os.replace replaces a file, but not a folder with content
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove the unfinished files and folders that killed processes left of `path`, or of another number in its name.

    Such are those of processes of this host that no longer run, and those of other hosts, which a node that is gone
    has left on a shared disk, if nothing in them has changed for a day.
    """
    name = r"\d+".join(map(re.escape, re.split(r"\d+", path.name)))  # a killed writer's step may never come again
    for entry in path.parent.iterdir():
        match = re.fullmatch(rf"\.tmp-{name}-(.+)-(\d+)", entry.name)
        if match is None:
            continue
        host, process_id = match.groups()
        is_dead = host == platform.node() and not _is_running(int(process_id))
        if is_dead or time.time() - _last_change(entry) > ABANDONED_AFTER_SECONDS:
            with contextlib.suppress(OSError):  # it may be another user's, or another process removes it, too
                _remove(entry)


def _last_change(path: Path) -> float:
    """Return when a file, or a folder or anything in it, was last modified; now if it is moved or cannot be read."""
    try:
        return max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
    except OSError:
        return time.time()


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)  # signal 0 only checks whether the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with indentation and sorted keys, so that files can be read and compared."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file to disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of_files(digests: Mapping[str, str]) -> str:
    """Return one sha256 over the digests of several files, which are given by file name."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return the sha256 of a file, which this process reads again only after the file has changed."""
    status = os.stat(path)
    # The time of the last change of the inode is there because anyone may set the time of the last modification.
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if stamp not in _sha256_of_stamp:
        _sha256_of_stamp[stamp] = sha256_of(path)
    return _sha256_of_stamp[stamp]


_sha256_of_stamp: dict[tuple[int, ...], str] = {}
