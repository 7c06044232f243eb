"""Files at a path or URI: list, read, write, move and remove them.

A file that is being written has a temporary name on a disk, and is a single put to an object store. So a reader finds
the old content or the new one, never a part of it.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from cluster.storage.failures import explain_failures, explains_failures
from cluster.storage.local_disk import sync_to_disk
from cluster.storage.object_stores import removed_on_failure, retry_throttled
from cluster.storage.paths import (
    is_local,
    join,
    local_path,
    nearest_folder,
    refuse_file_on_the_way,
    refuse_job_folder,
    resolve,
    split,
)
from cluster.storage.retried_reads import open_retried
from cluster.storage.temporaries import TEMPORARY_PREFIX, raise_storage_full, temporary_path
from raydit.errors import AlreadyExists, InvalidInput, NotFound
from raydit.regular_files import open_regular, read_regular, refuse_special_file, refuse_too_large

MAX_CONCURRENT_REQUESTS = 16
"""Requests to an object store that are made at the same time; each takes tens of milliseconds."""


@explains_failures
def exists(path: str) -> bool:
    """Return whether a file or folder exists."""
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type != FileType.NotFound


@explains_failures
def is_file(path: str) -> bool:
    """Return whether a path is that of an existing file, and not that of a folder."""
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type == FileType.File


@explains_failures
def read_bytes(path: str, *, max_bytes: int | None = None) -> bytes:
    """Return the content of a file. Raises NotFound, and SpecialFile for a device or named pipe.

    max_bytes: raise FileTooLarge for a longer file, of which no more than that is read.
    """
    filesystem, inner = resolve(path)

    def read() -> bytes:
        if is_local(path):
            return read_regular(inner, sys.maxsize if max_bytes is None else max_bytes, path)
        with filesystem.open_input_stream(inner) as stream:
            data = stream.read(None if max_bytes is None else max_bytes + 1)
            refuse_too_large(len(data), len(data) if max_bytes is None else max_bytes, path)
            return data

    with _raise_not_found(path, "a file"):
        return retry_throttled(read)


@explains_failures
def open_file(path: str) -> BinaryIO:
    """Open a file for reading and seeking. Raises NotFound, and SpecialFile for a device or named pipe.

    On a local disk this is the file itself; a file in an object store is downloaded into memory as a whole.
    """
    if not is_local(path):
        return io.BytesIO(read_bytes(path))
    with _raise_not_found(path, "a file"):
        return open_regular(local_path(path), path)


def read_json(path: str) -> Any:
    """Parse a JSON file. Raises NotFound, and InvalidInput for a file that is not JSON."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        do = "restore the file, or remove it and run the command that writes it again"
        raise InvalidInput(f"{path} is not valid JSON ({error})", "", do) from error


def read_json_object(path: str) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises NotFound, and InvalidInput for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        do = "restore the file, or remove it and run the command that writes it again"
        raise InvalidInput(f"{path}: found {str(value)[:100]}", "a JSON object", do)
    return value


@explains_failures
def list_names(folder: str) -> list[str]:
    """Return the sorted names of the files and folders directly inside a folder, without temporary ones.

    Raises NotFound.
    """
    return sorted({name for name, _ in list_entries(folder) if not name.startswith(TEMPORARY_PREFIX)})


@explains_failures
def list_entries(folder: str) -> set[tuple[str, bool]]:
    """Return the names directly inside a folder, each with whether it is a folder. Raises NotFound."""
    filesystem, inner = resolve(folder)
    # On Google Cloud Storage, pyarrow lists only folders that it has created: others follow from the files in them.
    recursive = folder.startswith(("gs://", "gcs://"))
    with _raise_not_found(folder, "a folder"):
        infos = filesystem.get_file_info(FileSelector(inner, allow_not_found=recursive, recursive=recursive))
        if recursive and not infos:
            raise FileNotFoundError  # pyarrow's own error there does not name the reason
    parts = [(info.path[len(inner) :].lstrip("/").partition("/"), info.type) for info in infos]
    return {(name, bool(slash) or kind == FileType.Directory) for (name, slash, _), kind in parts}


@explains_failures
def list_files(folder: str, *, recursive: bool = False) -> dict[str, int]:
    """Return the relative names of the files in a folder, sorted, with their sizes in bytes; without temporary files.

    A folder that does not exist has no files. An object store lists a thousand files per request.
    """
    filesystem, inner = resolve(folder)
    infos = select_files(filesystem, FileSelector(inner, allow_not_found=True, recursive=recursive))
    sizes = {info.path[len(inner) :].lstrip("/"): info.size for info in infos}
    return {name: sizes[name] for name in sorted(sizes) if f"/{TEMPORARY_PREFIX}" not in f"/{name}"}


def select_files(filesystem: FileSystem, selector: FileSelector) -> list[FileInfo]:
    """Return pyarrow's description of the files that a selector selects, without folders."""
    return [info for info in filesystem.get_file_info(selector) if info.type == FileType.File]


@explains_failures
def file_size(path: str) -> int:
    """Return the size of a file in bytes. Raises NotFound for a folder, and where nothing exists."""
    filesystem, inner = resolve(path)
    info = filesystem.get_file_info(inner)
    if info.type != FileType.File:
        found = f"{path} does not exist" if info.type == FileType.NotFound else f"{path} is not a file"
        raise NotFound(found, "a file", "correct the path")
    return info.size


def refuse_existing(path: str) -> None:
    """Raise AlreadyExists if a file or folder exists at a path, so that it is not overwritten."""
    if exists(path):
        raise AlreadyExists(f"{path} exists already", "a new path", "choose another, or move the existing one away")


def refuse_unwritable(path: str) -> None:
    """Raise an error if no file or folder can be written at a path; called before the work whose result goes there.

    Raises InvalidInput if the path leads through a file or is deleted with the job, and StorageFailed for a folder that
    cannot be written.
    """
    parent = split(path)[0] or os.curdir
    refuse_file_on_the_way(parent)
    refuse_job_folder(path)
    folder = nearest_folder(parent) if is_local(path) else parent
    probe = join(folder, f"{TEMPORARY_PREFIX}probe-{secrets.token_hex(4)}")
    with explain_failures(path, missing=True):
        write_atomically(probe, b"")
        remove_file(probe)


@explains_failures
def sha256_file(path: str) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces. Raises NotFound, and SpecialFile for a device."""
    filesystem, inner = resolve(path)
    if is_local(path):
        refuse_special_file(inner, path)
    open_path = filesystem.open_input_file if is_local(path) else partial(open_retried, filesystem)
    with _raise_not_found(path, "a file"), open_path(inner) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(path: str) -> int | None:
    """Return the free bytes on the disk of a path, which need not exist yet; None for an object store."""
    return shutil.disk_usage(nearest_folder(path)).free if is_local(path) else None


@explains_failures
def write_atomically(path: str, data: bytes | memoryview) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part of it.

    Raises StorageFull, and removes the incomplete file, when the disk has no space left.
    """
    if not is_local(path):
        filesystem, inner = resolve(path)
        with filesystem.open_output_stream(inner) as stream:
            stream.write(data)
        return
    target = local_path(path)
    folder = os.path.dirname(target)
    with raise_storage_full(folder, len(data)):
        os.makedirs(folder, exist_ok=True)
        with temporary_path(folder, len(data)) as temporary:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        sync_to_disk(folder)


def write_json_atomically(path: str, value: Any) -> None:
    """Write a value as indented JSON; raises ValueError for NaN and infinity, which JSON does not have."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def upload_file(local_file: str, destination: str) -> None:
    """Copy a local file to an object store, where it appears completely or not at all."""
    filesystem, inner = resolve(destination)
    with explain_failures(destination), removed_on_failure(filesystem, inner):
        copy_files(local_file, inner, LocalFileSystem(), filesystem)


@explains_failures
def move_file(source: str, destination: str) -> None:
    """Move a file within one file system; a file at the destination is replaced."""
    filesystem, inner = resolve(source)
    filesystem.move(inner, resolve(destination)[1])


@explains_failures
def remove_file(path: str) -> None:
    """Remove a file if it exists."""
    filesystem, inner = resolve(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(inner)


@contextlib.contextmanager
def _raise_not_found(path: str, expected: str) -> Iterator[None]:
    """Replace a FileNotFoundError of the file system with one that names the path as the caller gave it."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist", expected, "correct the path") from error
