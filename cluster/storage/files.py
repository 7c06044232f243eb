"""Files at a path or URI: read, listed, and written so that nothing half-written is ever seen under its final name."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from typing import Any, BinaryIO

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from cluster.storage.local_disk import sync
from cluster.storage.object_stores import patiently
from cluster.storage.paths import is_local, local_path, nearest_folder, resolve
from cluster.storage.temporaries import TEMPORARY_PREFIX, temporary_in

REQUESTS_AT_ONCE = 16
"""To an object store, where each takes tens of milliseconds and many go side by side."""


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
    infos = files_in(filesystem, FileSelector(inner, allow_not_found=True, recursive=recursive))
    sizes = {info.path[len(inner) :].lstrip("/"): info.size for info in infos}
    return {name: sizes[name] for name in sorted(sizes) if f"/{TEMPORARY_PREFIX}" not in f"/{name}"}


def files_in(filesystem: FileSystem, selector: FileSelector) -> list[FileInfo]:
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


def upload_file(local_file: str, destination: str) -> None:
    """Put a file into an object store, where it appears whole or not at all."""
    filesystem, inner = resolve(destination)
    copy_files(local_file, inner, LocalFileSystem(), filesystem)


def move_file(source: str, destination: str) -> None:
    """Move a file within one file system; what is at the destination is replaced."""
    filesystem, inner = resolve(source)
    filesystem.move(inner, resolve(destination)[1])


def remove_file(path: str) -> None:
    """Remove a file; one that is not there is fine."""
    filesystem, inner = resolve(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(inner)
