"""Local copies of files and folders that are in an object store."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, LocalFileSystem, copy_files

from cluster.storage.files import file_size, files_in, read_bytes
from cluster.storage.folders import remove_stale_temporaries
from cluster.storage.local_disk import rename_unless_there
from cluster.storage.object_stores import patiently
from cluster.storage.paths import cache_folder, is_local, local_path, resolve, split
from cluster.storage.temporaries import alone_in, temporary_in


def fetch_folder(path: str) -> str:
    """A local folder with the content of `path`: itself when local, else a copy that the workers share.

    The copy is named after the URI and its listing (names, sizes, times), so a folder that was rewritten
    at the same address is fetched anew. Of several workers one fetches and the others wait for it.
    """
    if is_local(path):
        return local_path(path)
    filesystem, inner = resolve(path)
    infos = files_in(filesystem, FileSelector(inner, recursive=True))
    return _fetched(path, infos, lambda folder: copy_files(inner, folder, filesystem, LocalFileSystem()))


def fetch_file(path: str) -> str:
    """The same for a file. Raises FileNotFoundError."""
    file_size(path)  # raises
    if is_local(path):
        return local_path(path)
    filesystem, inner = resolve(path)
    infos, name = [filesystem.get_file_info(inner)], split(path)[1]
    folder = _fetched(
        path, infos, lambda folder: copy_files(inner, os.path.join(folder, name), filesystem, LocalFileSystem())
    )
    return os.path.join(folder, name)


def _fetched(path: str, infos: list[FileInfo], copy: Callable[[str], None]) -> str:
    """The folder in the cache that `copy` has filled with the files that are described."""
    files = sorted((info.path, info.size, info.mtime_ns) for info in infos)
    name = hashlib.sha256(repr((path, files)).encode()).hexdigest()[:16]
    cache = cache_folder("fetched")
    fetched = os.path.join(cache, name)
    os.makedirs(cache, exist_ok=True)
    with alone_in(cache):
        if not os.path.isdir(fetched):
            remove_stale_temporaries(cache)
            num_bytes = sum(size for _, size, _ in files)
            with temporary_in(cache, num_bytes) as temporary:
                os.mkdir(temporary)
                patiently(lambda: copy(temporary))
                rename_unless_there(temporary, fetched)
    return fetched


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The file itself when local, else a copy with its name, gone afterwards."""
    if is_local(path):
        yield local_path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, split(path)[1])
        Path(copy).write_bytes(read_bytes(path))
        yield copy
