"""Who owns a file, in folders that several users write to."""

import os
import pwd
import tempfile
from collections.abc import Iterable


def is_own(path: str) -> bool:
    """Return whether this user made a file, folder or link on a local disk.

    On disks that give every file one owner (a share that maps users, a mounted bucket) all files are everyone's own.
    """
    owner = os.lstat(path).st_uid
    return owner == os.geteuid() or owner == _owner_of_new_files(os.path.dirname(path))


def others_files(paths: Iterable[str]) -> list[str]:
    """Return those of the paths that exist and that another user made."""
    return [path for path in paths if os.path.lexists(path) and not is_own(path)]


def owner_name(path: str) -> str:
    """Return the name of a file's owner, or its number where the machine knows no name."""
    uid = os.lstat(path).st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _owner_of_new_files(folder: str) -> int | None:
    """Return the owner that a disk gives to a new file of this user; None where the user may not write."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None
