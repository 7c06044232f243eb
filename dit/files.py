"""Files and folders that appear whole or not at all, and never over what somebody has."""

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
    """Raise OSError (ENOSPC) where safetensors, whose errors carry no code, finds no room at `path`."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def unused(path: str | Path) -> Path:
    """The path, if nothing is there but perhaps an empty folder. Raises FileExistsError."""
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: expected a new path. Choose another, or move it away")
    return path


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a temporary name beside `path`, then give it its name.

    What stands at `path` is replaced only then; a `write` that fails leaves nothing behind, and what one that was
    killed left is removed by the next. Two processes that write the same path do not meet: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = f".tmp-{path.name}-{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(ours)}*"):
        if not _is_running(left.name.removeprefix(ours)):
            _remove(left)
    temporary = path.with_name(f"{ours}{os.getpid()}")
    _remove(temporary)
    try:
        with full_disk_as_oserror(path):
            write(temporary)
        if path.is_dir():
            shutil.rmtree(path)  # a file is replaced in one step, a folder only when it is empty
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def _is_running(process_id: str) -> bool:
    if not process_id.isdigit():
        return True  # not ours to judge
    try:
        os.kill(int(process_id), 0)  # signal 0 asks only whether the process is there
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write JSON that people can read and compare: indented, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One sha256 over the digests of several files by their names."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
