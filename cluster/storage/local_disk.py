"""Folders on a disk of this machine: moved whole, and safe from a loss of power."""

import errno
import os
import shutil
from pathlib import Path

from cluster.storage.temporaries import temporary_in


def publish_on_disk(local_folder: str, target: str) -> None:
    """Rename a finished folder, or copy it to another disk, so that its new name means all of it, on disk."""
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    _sync_files(local_folder)
    try:
        os.rename(local_folder, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        sizes = (os.path.getsize(os.path.join(local_folder, name)) for name in files_below(local_folder))
        with temporary_in(parent, sum(sizes)) as temporary:
            _copy_files(local_folder, temporary)
            _sync_files(temporary)
            os.rename(temporary, target)
    sync(parent)


def _copy_files(source: str, target: str) -> None:
    for name in files_below(source):
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def _sync_files(folder: str) -> None:
    for name in files_below(folder):
        sync(os.path.join(folder, name))


def files_below(folder: str) -> list[str]:
    """Sorted names of all files in a folder and the folders below it, relative to it."""
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in files)


def rename_unless_there(source: str, target: str) -> None:
    """Rename a folder, or let it be if another process has put the same folder there meanwhile."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def sync(path: str) -> None:
    """Force a file or the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
