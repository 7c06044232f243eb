"""Folders on a disk of this machine: publish them under their final name so that they survive a loss of power."""

import errno
import os
import shutil
from pathlib import Path

from cluster.storage.temporaries import raise_storage_full, temporary_path


def publish_on_disk(local_folder: str, target: str) -> None:
    """Rename a finished folder, or copy it to another disk, after all its files have been forced to disk.

    So its new name never stands for an incomplete folder. Raises StorageFull.
    """
    parent = os.path.dirname(target)
    with raise_storage_full(parent):
        os.makedirs(parent, exist_ok=True)
        _sync_files(local_folder)
        try:
            os.rename(local_folder, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_to_other_disk(local_folder, target)
        sync_to_disk(parent)


def _copy_to_other_disk(local_folder: str, target: str) -> None:
    sizes = (os.path.getsize(os.path.join(local_folder, name)) for name in list_files_below(local_folder))
    with temporary_path(os.path.dirname(target), sum(sizes)) as temporary:
        for name in list_files_below(local_folder):
            os.makedirs(os.path.dirname(os.path.join(temporary, name)), exist_ok=True)
            shutil.copyfile(os.path.join(local_folder, name), os.path.join(temporary, name))
        _sync_files(temporary)
        os.rename(temporary, target)


def _sync_files(folder: str) -> None:
    for name in list_files_below(folder):
        sync_to_disk(os.path.join(folder, name))


def list_files_below(folder: str) -> list[str]:
    """Return the sorted names of all files in a folder and its subfolders, relative to the folder."""
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in files)


def rename_unless_exists(source: str, target: str) -> None:
    """Rename a folder, or do nothing if another process has put the same folder there in the meantime."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def sync_to_disk(path: str) -> None:
    """Force the content of a file, or the names in a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
