"""Folders at a path or URI: publish, move and remove them so that a folder that looks finished is complete.

On a disk a folder appears under its final name by one rename. In an object store it counts as finished when the file
that is written last is there.
"""

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from pyarrow.fs import FileSelector

from cluster.storage.failures import explain_failures, explains_failures
from cluster.storage.files import MAX_CONCURRENT_REQUESTS, exists, select_files, upload_file
from cluster.storage.local_disk import list_files_below, publish_on_disk
from cluster.storage.object_stores import copy_in_store
from cluster.storage.paths import is_local, join, local_path, resolve
from cluster.storage.temporaries import raise_storage_full, remove_stale
from raydit.errors import AlreadyExists


def publish_folder(local_folder: str, destination: str, *, last: str) -> None:
    """Move a finished local folder to its destination, where it appears completely or not at all.

    On a disk it is renamed. In an object store the file named `last` is uploaded last, and a folder without that file
    does not count as finished. Raises AlreadyExists if the destination is a finished folder (see move_folder), and
    StorageFull when its disk has no space left.
    """
    assert os.path.isfile(os.path.join(local_folder, last)), f"{local_folder} has no {last}"
    _refuse_finished(destination, last)
    if is_local(destination):
        with explain_failures(destination):
            publish_on_disk(local_folder, local_path(destination))
    else:
        _upload(local_folder, destination, last)
    shutil.rmtree(local_folder, ignore_errors=True)


def _refuse_finished(folder: str, last: str) -> None:
    if exists(folder if is_local(folder) else join(folder, last)):
        raise AlreadyExists(f"{folder} exists already", "a new path", "move it away, or choose another name")


def _upload(local_folder: str, destination: str, last: str) -> None:
    names = [name for name in list_files_below(local_folder) if name != last]
    for name in [*names, last]:
        upload_file(os.path.join(local_folder, name), join(destination, name))


@explains_failures
def move_folder(source: str, destination: str, *, last: str) -> None:
    """Move a folder within one file system, for example to keep a superseded artifact under another name.

    On a disk this is one rename. In an object store all files are copied and then removed, those that were written
    last first: the file that marks the folder as finished goes before the others. Only the file named `last` is copied
    last and removed last, so that a move that was interrupted can be repeated.
    Raises AlreadyExists if the destination is a finished folder.
    """
    _refuse_finished(destination, last)
    filesystem, inner_source = resolve(source)
    _, inner_destination = resolve(destination)
    if is_local(source):
        parent = os.path.dirname(inner_destination)
        with raise_storage_full(parent):
            os.makedirs(parent, exist_ok=True)
            os.rename(inner_source, inner_destination)
        return
    files = select_files(filesystem, FileSelector(inner_source, recursive=True))
    files.sort(key=lambda info: (info.path == f"{inner_source}/{last}", -(info.mtime_ns or 0), info.path))
    assert files and files[-1].base_name == last, f"{source} has no {last}"
    targets = [inner_destination + info.path[len(inner_source) :] for info in files]
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        list(pool.map(copy_in_store, repeat(filesystem), files[:-1], targets[:-1]))
    copy_in_store(filesystem, files[-1], targets[-1])
    for info in files:
        filesystem.delete_file(info.path)
    remove_folder(source)  # pyarrow puts an empty object of the folder's name there whenever it removes a file


@explains_failures
def remove_folder(path: str) -> None:
    """Remove a folder and everything in it, if it exists."""
    if exists(path):
        filesystem, inner = resolve(path)
        # On Google Cloud Storage, pyarrow finally removes a marker object, which only folders that it created have.
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(inner)


@explains_failures
def remove_stale_temporaries(folder: str) -> list[str]:
    """Remove the incomplete files that killed processes left directly inside a folder on disk, and return their names.

    An object store has no such files, because a put is atomic.
    """
    return remove_stale(Path(local_path(folder))) if is_local(folder) and exists(folder) else []
