"""Local copies of files and folders that are in an object store."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileType, LocalFileSystem, copy_files

from cluster.storage.failures import explains_failures
from cluster.storage.files import MAX_CONCURRENT_REQUESTS, file_size, read_bytes
from cluster.storage.folders import remove_stale_temporaries
from cluster.storage.local_disk import rename_unless_exists
from cluster.storage.object_stores import retry_throttled
from cluster.storage.paths import cache_folder, is_local, local_path, resolve, split
from cluster.storage.temporaries import lock, raise_storage_full, temporary_path
from raydit.listed_names import require_all_inside, require_inside

FOLDER_SUFFIX = "-folder"
"""End of the names of copies of folders. These are read as soon as they are fetched; those of files may be later."""
UNUSED_SECONDS = 3600.0
"""Time since a copy of a folder was last fetched after which it may be removed, if the disk needs the room."""
ROOM_FACTOR = 1.05
"""Room that a copy needs on a disk, as a multiple of its bytes."""


@explains_failures
def fetch_folder(path: str, *, without: str = "") -> str:
    """Return a local folder with the content of `path`: the folder itself if it is local, else a cached copy.

    without: name of a folder in it that is left out, unless there is a copy of all already. The copy is named after the
    URI and its listing (names, sizes, times), so a folder that was rewritten at the same URI is downloaded again. One
    worker of a machine downloads, and the others wait for it. Where the cache's disk has no room for a copy, those of
    folders that have not been fetched for an hour are removed. Raises StorageFull when that is not enough, and
    InvalidInput for a key with "..", which would be written outside the cache.
    """
    if is_local(path):
        return local_path(path)
    filesystem, inner = resolve(path)
    listed = filesystem.get_file_info(FileSelector(inner, recursive=True))
    require_all_inside((info.path[len(inner) :].strip("/") for info in listed), path)  # folders are created as well
    infos = [info for info in listed if info.type == FileType.File]
    names = {info.path: info.path[len(inner) :].strip("/") for info in infos}
    kept = [info for info in infos if not names[info.path].startswith(f"{without}/")]
    if len(kept) == len(infos) or os.path.isdir(_copy_of(path, infos, FOLDER_SUFFIX)):
        copy_all = partial(copy_files, inner, source_filesystem=filesystem, destination_filesystem=LocalFileSystem())
        return _fetch(path, infos, copy_all, FOLDER_SUFFIX)

    def copy(folder: str) -> None:
        targets = [os.path.join(folder, names[info.path]) for info in kept]
        for target in targets:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
            sources = [info.path for info in kept]
            list(pool.map(copy_files, sources, targets, repeat(filesystem), repeat(LocalFileSystem())))

    return _fetch(path, kept, copy, FOLDER_SUFFIX)


@explains_failures
def fetch_file(path: str) -> str:
    """Return a local file with the content of `path`: the file itself if it is local, else a cached copy.

    The copy is kept and shared as that of a folder is (see fetch_folder). Raises NotFound, and StorageFull when the
    cache's disk has no space left.
    """
    file_size(path)  # raises NotFound
    if is_local(path):
        return local_path(path)
    filesystem, inner = resolve(path)
    infos, name = [filesystem.get_file_info(inner)], require_inside(split(path)[1], path)
    folder = _fetch(
        path, infos, lambda folder: copy_files(inner, os.path.join(folder, name), filesystem, LocalFileSystem())
    )
    return os.path.join(folder, name)


def _fetch(path: str, infos: list[FileInfo], copy: Callable[[str], None], suffix: str = "") -> str:
    """Return the folder in the cache for the described files; `copy` fills it if it is not there yet."""
    fetched = _copy_of(path, infos, suffix)
    cache = os.path.dirname(fetched)
    num_bytes = sum(info.size for info in infos)
    with raise_storage_full(cache, num_bytes):
        os.makedirs(cache, exist_ok=True)
    with lock(cache):
        if os.path.isdir(fetched):
            os.utime(fetched)
        else:
            remove_stale_temporaries(cache)
            _make_room(cache, num_bytes)
            with temporary_path(cache, num_bytes) as temporary:
                os.mkdir(temporary)
                retry_throttled(lambda: copy(temporary))
                rename_unless_exists(temporary, fetched)
    return fetched


def _make_room(cache: str, num_bytes: int) -> None:
    """Remove unused copies of folders, the longest unused first, until the disk has room for some bytes."""
    copies = (entry for entry in os.scandir(cache) if entry.name.endswith(FOLDER_SUFFIX))
    for used, path in sorted((entry.stat().st_mtime, entry.path) for entry in copies):
        has_room = shutil.disk_usage(cache).free >= ROOM_FACTOR * num_bytes
        if has_room or time.time() - used < UNUSED_SECONDS:
            return
        with temporary_path(cache, 0) as temporary:  # a killed process leaves no copy of a part
            os.rename(path, temporary)


def _copy_of(path: str, infos: list[FileInfo], suffix: str) -> str:
    """Return the path of the folder in the cache for the described files, whether or not it is there."""
    files = sorted((info.path, info.size, info.mtime_ns) for info in infos)
    name = hashlib.sha256(repr((path, files)).encode()).hexdigest()[:16]
    return os.path.join(cache_folder("fetched"), f"{name}{suffix}")


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Provide a local file inside a `with` block: the file itself if it is local, else a copy that is removed again.

    The copy has the same file name.
    """
    if is_local(path):
        yield local_path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy, content = os.path.join(folder, require_inside(split(path)[1], path)), read_bytes(path)
        with raise_storage_full(folder, len(content)):
            Path(copy).write_bytes(content)
        yield copy
