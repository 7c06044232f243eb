"""Folders at a path or URI: published, moved and removed so that one that looks finished is complete."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from pyarrow.fs import FileSelector

from cluster.storage.files import REQUESTS_AT_ONCE, exists, files_in, upload_file
from cluster.storage.local_disk import files_below, publish_on_disk
from cluster.storage.object_stores import copy_in_store
from cluster.storage.paths import is_local, join, local_path, resolve
from cluster.storage.temporaries import remove_stale


def publish_folder(local_folder: str, destination: str, *, last: str) -> None:
    """Move a finished local folder to its destination, where it appears whole or not at all.

    On disk it is renamed. In an object store the file named `last` is put last: without it the folder does
    not count. Raises FileExistsError if a finished folder is there already (see move_folder).
    """
    assert os.path.isfile(os.path.join(local_folder, last)), f"{local_folder} has no {last}"
    if exists(destination if is_local(destination) else join(destination, last)):
        raise FileExistsError(
            f"{destination} is there already; move it aside or choose another name before publishing there"
        )
    if is_local(destination):
        publish_on_disk(local_folder, local_path(destination))
    else:
        _upload(local_folder, destination, last)
    shutil.rmtree(local_folder, ignore_errors=True)


def _upload(local_folder: str, destination: str, last: str) -> None:
    names = [name for name in files_below(local_folder) if name != last]
    for name in [*names, last]:
        upload_file(os.path.join(local_folder, name), join(destination, name))


def move_folder(source: str, destination: str, *, last: str) -> None:
    """Move a folder within one file system, for example to put a superseded artifact aside.

    On disk one rename. In an object store a copy, and then what was written last is removed first: what says that
    something is whole goes before the thing itself. The file named `last` is copied last and removed last, so that
    a move that was cut off can be done again.
    """
    if exists(destination if is_local(destination) else join(destination, last)):
        raise FileExistsError(f"{destination} is there already; choose another name to move {source} to")
    filesystem, inner_source = resolve(source)
    _, inner_destination = resolve(destination)
    if is_local(source):
        os.makedirs(os.path.dirname(inner_destination), exist_ok=True)
        os.rename(inner_source, inner_destination)
        return
    files = files_in(filesystem, FileSelector(inner_source, recursive=True))
    files.sort(key=lambda info: (info.path == f"{inner_source}/{last}", -(info.mtime_ns or 0), info.path))
    assert files and files[-1].base_name == last, f"{source} has no {last}"
    targets = [inner_destination + info.path[len(inner_source) :] for info in files]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        list(pool.map(copy_in_store, repeat(filesystem), files[:-1], targets[:-1]))
    copy_in_store(filesystem, files[-1], targets[-1])
    for info in files:
        filesystem.delete_file(info.path)
    remove_folder(source)  # the empty object of its name, which pyarrow puts there for every file removed


def remove_folder(path: str) -> None:
    """Remove a folder and all it holds; one that is not there is fine."""
    if exists(path):
        filesystem, inner = resolve(path)
        filesystem.delete_dir(inner)


def remove_stale_temporaries(folder: str) -> list[str]:
    """Remove what killed processes left half-written directly inside a folder on disk, and return the names."""
    return remove_stale(Path(local_path(folder))) if is_local(folder) and exists(folder) else []
