"""Open files for reading, and nothing that only looks like one: a device has no end, a named pipe waits forever."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from raydit.errors import InvalidInput

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
"""What users call the special files, by the type in their mode. Folders are not among them: opening one fails."""


class SpecialFile(InvalidInput):
    """A device, named pipe or socket, or a link to one, under the name of a file."""


class FileTooLarge(InvalidInput):
    """A file that is larger than any intact file of its kind, so that it is not read into memory."""


def describe_special(mode: int) -> str:
    """Return in words what a file's `st_mode` says that it is, if it is a special file; empty for any other."""
    return KINDS.get(stat.S_IFMT(mode), "")


def refuse_special_file(path: str | Path, where: str | None = None) -> None:
    """Raise SpecialFile if a path, after following links, is a device, named pipe or socket.

    For files that a library opens. A path that does not exist passes: whoever opens it says so better. where: the file
    as messages call it; the path by default.
    """
    try:
        kind = describe_special(os.stat(path).st_mode)
    except OSError:
        return
    _refuse(kind, str(path) if where is None else where)


def open_regular(path: str | Path, where: str | None = None) -> BinaryIO:
    """Open a file for reading, as `open(path, "rb")` does. Raises SpecialFile instead of waiting on a special file.

    where: as in `refuse_special_file`.
    """
    where = str(path) if where is None else where
    return open(path, "rb", opener=lambda path, _: _open_descriptor(path, where)[0])


def read_regular(path: str | Path, max_bytes: int, where: str | None = None) -> bytes:
    """Return a file's content. Raises SpecialFile, FileTooLarge for more than `max_bytes`, and OSError as open does.

    where: as in `refuse_special_file`.
    """
    where = str(path) if where is None else where
    descriptor, num_bytes = _open_descriptor(path, where)
    try:
        refuse_too_large(num_bytes, max_bytes, where)
        data = os.read(descriptor, num_bytes + 1)
        # A disk may return less at a time, and the files of /proc are longer than their length of 0.
        while data and (further := os.read(descriptor, max(num_bytes - len(data), 2**16))):
            data += further
            refuse_too_large(len(data), max_bytes, where)
        return data
    finally:
        os.close(descriptor)


def refuse_too_large(num_bytes: int, max_bytes: int, where: str) -> None:
    """Raise FileTooLarge if a file is longer than an intact one of its kind is. where: the file, for the message."""
    if num_bytes > max_bytes:
        raise FileTooLarge(
            f"{where}: found {num_bytes:,} bytes", f"at most {max_bytes:,}", "check that it is the right file"
        )


def _open_descriptor(path: str | Path, where: str) -> tuple[int, int]:
    """Open a regular file; return its descriptor and its length in bytes.

    What was opened is looked at, so that no other file can take its place in between.
    """
    # O_NONBLOCK means nothing for a regular file; without it, opening a named pipe waits for a writer.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        refuse_special_file(path, where)  # a socket cannot be opened at all
        raise
    status = os.fstat(descriptor)
    try:
        _refuse(describe_special(status.st_mode), where)
    except SpecialFile:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _refuse(kind: str, where: str) -> None:
    if kind:
        raise SpecialFile(f"{where} is {kind}", "a regular file", "remove it, or put the file itself there")
