"""Git LFS pointers: small text files that stand in a clone for large files that were not fetched."""

from pathlib import Path

from raydit.errors import InvalidInput
from raydit.regular_files import open_regular

POINTER_START = b"version https://git-lfs.github.com/spec/"
"""First bytes of every pointer."""


def is_lfs_pointer(data: bytes) -> bool:
    """Return whether some bytes are the content of a Git LFS pointer. More than the first kilobyte is not needed."""
    return data.startswith(POINTER_START)


def refuse_lfs_pointer(data: bytes, where: str, expected: str = "the file itself") -> None:
    """Raise InvalidInput if some bytes are the content of a Git LFS pointer. where: the file, for the message."""
    if is_lfs_pointer(data):
        raise InvalidInput(
            f"{where} is a Git LFS pointer", expected, "run `git lfs pull` in the clone that it comes from"
        )


def refuse_lfs_pointer_file(path: str | Path, expected: str = "the file itself") -> None:
    """Raise InvalidInput if a file on this machine is a Git LFS pointer, or no regular file but a device or named pipe.

    A file that cannot be read is none of these.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(POINTER_START))
    except OSError:
        return
    refuse_lfs_pointer(start, str(path), expected)
