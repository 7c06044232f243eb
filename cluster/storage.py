"""Paths that are a folder on disk or a URI (s3://, gs://, file://), read and written alike.

Nothing half-written is ever seen under its final name: on disk a file or folder gets a temporary name first
and is renamed; in an object store one put is atomic, and a folder is finished when its last file is there.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from cluster.credentials import refuse_password
from cluster.local_disk import files_below, publish_on_disk, rename_unless_there, sync
from cluster.object_stores import copy_in_store, patiently, resolve_in_bucket
from cluster.temporaries import TEMPORARY_PREFIX, alone_in, remove_stale, temporary_in

REQUESTS_AT_ONCE = 16
"""To an object store, where each takes tens of milliseconds and many go side by side."""


def is_local(path: str) -> bool:
    """Whether the path lies on a disk of this machine (a plain path or file://)."""
    return "://" not in path or path.startswith("file://")


def join(base: str, *parts: str) -> str:
    """Join a folder and names below it; the query of a URI (?endpoint_override=...) stays at the end."""
    below = [part.strip("/") for part in parts]
    if is_local(base):
        return os.path.join(base, *below)
    stem, question_mark, query = base.partition("?")
    return "/".join([stem.rstrip("/"), *below]) + question_mark + query


def split(path: str) -> tuple[str, str]:
    """The folder that a file or folder lies in, and its name there: join(*split(path)) is the path."""
    stem, question_mark, query = (path, "", "") if is_local(path) else path.partition("?")
    folder, _, name = stem.rstrip("/").rpartition("/")
    return folder + question_mark + query, name


def absolute(path: str) -> str:
    """The same place for a process with another working directory: an absolute path, or the URI."""
    return local_path(path) if is_local(path) else path


def safe_name(name: str) -> str:
    """Return a file name or relative path that came from outside, if it stays inside its folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", name):
        raise ValueError(
            f"found the file name {name!r}, expected a relative path that stays inside its folder; "
            "do not use the file that lists it, unless you trust and repair it"
        )
    return name


def local_path(path: str) -> str:
    """The absolute path on disk of a local path or file:// URI."""
    assert is_local(path), f"{path} is not on a local disk"
    return resolve(path)[1]


def resolve(path: str) -> tuple[FileSystem, str]:
    """The file system of a path, and the path inside it. Raises ValueError for a URI with a password."""
    if "://" not in path:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    refuse_password("path", path)
    try:
        return resolve_in_bucket(path) or FileSystem.from_uri(path)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise ValueError(
            f"found the path {path!r}, expected a local path or a URI that pyarrow.fs opens "
            f"(s3://BUCKET/KEY, gs://BUCKET/KEY, file:///FOLDER); pyarrow says: {error}"
        ) from error


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type != FileType.NotFound


def read_bytes(path: str) -> bytes:
    """A file's whole content."""
    filesystem, inner = resolve(path)

    def read() -> bytes:
        with filesystem.open_input_stream(inner) as stream:
            return stream.read()

    return patiently(read)


def opened(path: str) -> BinaryIO:
    """A file to read from and seek in: on disk the file itself, of an object store all its content in memory."""
    return open(local_path(path), "rb") if is_local(path) else io.BytesIO(read_bytes(path))


def read_json(path: str) -> Any:
    """Parse a JSON file; a broken one is named in the ValueError."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore the file or write it anew") from error


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder, without temporary ones."""
    filesystem, inner = resolve(folder)
    names = (info.base_name for info in filesystem.get_file_info(FileSelector(inner)))
    return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))


def list_files(folder: str, *, recursive: bool = False) -> dict[str, int]:
    """Relative name and size in bytes of the files in a folder, in order, without temporary ones.

    One request for a thousand of them in an object store. A folder that is not there has none.
    """
    filesystem, inner = resolve(folder)
    infos = _files(filesystem, FileSelector(inner, allow_not_found=True, recursive=recursive))
    sizes = {info.path[len(inner) :].lstrip("/"): info.size for info in infos}
    return {name: sizes[name] for name in sorted(sizes) if f"/{TEMPORARY_PREFIX}" not in f"/{name}"}


def _files(filesystem: FileSystem, selector: FileSelector) -> list[FileInfo]:
    return [info for info in filesystem.get_file_info(selector) if info.type == FileType.File]


def file_size(path: str) -> int:
    """Size of a file in bytes."""
    filesystem, inner = resolve(path)
    info = filesystem.get_file_info(inner)
    if info.type != FileType.File:
        raise FileNotFoundError(f"{path} is not a file")
    return info.size


def refuse_existing(path: str) -> None:
    """Raise FileExistsError where something is, which nobody asked to replace."""
    if exists(path):
        raise FileExistsError(f"{path} exists already: expected a new path. Choose another, or move it away")


def sha256_file(path: str) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    filesystem, inner = resolve(path)
    with filesystem.open_input_file(inner) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(path: str) -> int | None:
    """Bytes that can still be written at a path that need not exist yet; None for an object store."""
    return shutil.disk_usage(nearest_folder(path)).free if is_local(path) else None


def nearest_folder(path: str) -> str:
    """The path itself or the nearest folder above it that exists on disk."""
    folder = Path(local_path(path))
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


def fetch_folder(path: str) -> str:
    """A local folder with the content of `path`: itself when local, else a copy that the workers share.

    The copy is named after the URI and its listing (names, sizes, times), so a folder that was rewritten
    at the same address is fetched anew. Of several workers one fetches and the others wait for it.
    """
    if is_local(path):
        return local_path(path)
    filesystem, inner = resolve(path)
    infos = _files(filesystem, FileSelector(inner, recursive=True))
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


def on_this_machine(path: str) -> str:
    """A local folder for what can only be on a disk: the place itself, or one in the cache that belongs to its URI."""
    if is_local(path):
        return local_path(path)
    return os.path.join(cache_folder("beside"), hashlib.sha256(path.encode()).hexdigest()[:16])


def cache_folder(kind: str) -> str:
    """Where this machine keeps what can be fetched or made again."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "raydit", kind)


def write_atomically(path: str, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of it.

    Raises StorageFull, and removes what was half-written, when the disk has no room.
    """
    if not is_local(path):
        filesystem, inner = resolve(path)
        with filesystem.open_output_stream(inner) as stream:
            stream.write(data)
        return
    target = local_path(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with temporary_in(os.path.dirname(target), len(data)) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    sync(os.path.dirname(target))


def write_json_atomically(path: str, value: Any) -> None:
    """Write a value as indented JSON; NaN and infinity, which JSON does not know, are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


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


def upload_file(local_file: str, destination: str) -> None:
    """Put a file into an object store, where it appears whole or not at all."""
    filesystem, inner = resolve(destination)
    copy_files(local_file, inner, LocalFileSystem(), filesystem)


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
    files = _files(filesystem, FileSelector(inner_source, recursive=True))
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


def move_file(source: str, destination: str) -> None:
    """Move a file within one file system; what is at the destination is replaced."""
    filesystem, inner = resolve(source)
    filesystem.move(inner, resolve(destination)[1])


def remove_file(path: str) -> None:
    """Remove a file; one that is not there is fine."""
    filesystem, inner = resolve(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(inner)


def remove_stale_temporaries(folder: str) -> list[str]:
    """Remove what killed processes left half-written directly inside a folder on disk, and return the names."""
    return remove_stale(Path(local_path(folder))) if is_local(folder) and exists(folder) else []
