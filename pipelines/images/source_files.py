"""The files of an image source: in a folder on disk, or under a prefix of an object store."""

import difflib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from cluster import storage
from raydit.errors import InvalidInput, NotFound, RayditError
from raydit.listed_names import require_utf8
from raydit.regular_files import FileTooLarge, SpecialFile, read_regular, refuse_special_file, refuse_too_large

MAX_FILE_BYTES = 2**31
"""Largest image or table that is read into memory; no encoding of the largest image that is decoded is longer."""
MAX_DESCRIPTION_BYTES = 2**26
"""Largest file that describes a data set, such as dataset_infos.json."""
LOST_AND_FOUND = "lost+found"
"""Folder that mkfs makes at the top of a disk, readable by root alone."""

Result = TypeVar("Result")


class Files:
    """Names, lengths and content of the files in a folder and its subfolders. Hidden files and folders are left out.

    root: path or URI of the folder. Names are relative to it.
    """

    def __init__(self, root: str):
        self.root = root

    def __repr__(self) -> str:
        return f"Files({self.root!r})"

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine, and not in an object store."""
        return storage.is_local(self.root)

    @cached_property
    def _resolved(self) -> tuple[FileSystem, str]:
        """The root's file system, and its path in it."""
        return storage.resolve(self.root)

    def path(self, name: str) -> str:
        """Return the path or URI of a file."""
        return storage.join(self.root, name)

    def subfolder(self, name: str) -> "Files":
        """Return the files of a subfolder; the same files if the name is empty."""
        return Files(storage.join(self.root, name)) if name else self

    def list_all(self, *, skip_unreadable: bool = False) -> tuple[list[str], np.ndarray]:
        """Return the sorted names of all files, those in subfolders included, and their lengths in bytes (int64).

        skip_unreadable: leave out folders that may not be read, instead of raising InvalidInput.
        """
        filesystem, folder = self._resolved
        if self.is_local:
            pairs = sorted(_walk(folder, skip_unreadable))
        else:
            try:
                infos = filesystem.get_file_info(FileSelector(folder, recursive=True))
            except FileNotFoundError as error:
                # For a key with an empty part, pyarrow looks for a folder that is not there.
                raise InvalidInput(
                    f"images.path: found a name that cannot be listed under {self.root} ({error})",
                    "keys without empty parts",
                    "rename the keys with // in them",
                ) from error
            start = len(folder.rstrip("/")) + 1
            pairs = sorted((info.path[start:], info.size) for info in infos if info.type == FileType.File)
            pairs = [pair for pair in pairs if "/." not in "/" + pair[0]]
        names = [name for name, _ in pairs]
        require_utf8(names, self.root, "images.path")
        return names, np.array([size for _, size in pairs], np.int64)

    def list_top(self) -> tuple[list[str], list[str]]:
        """Return the sorted names of the folders and of the files directly in the root."""
        if self.is_local:  # where links may lead nowhere
            entries = {(entry.name, _is_folder(entry)) for entry in _scan(self._resolved[1])}
        else:
            entries = storage.list_entries(self.root)
        shown = sorted((name, is_folder) for name, is_folder in entries if not name.startswith("."))
        return [name for name, is_folder in shown if is_folder], [name for name, is_folder in shown if not is_folder]

    def version(self, name: str) -> tuple[int | None, int | None]:
        """Return a file's length in bytes and the time of its last change in ns, which tell whether it was replaced.

        They are None if the file does not exist, or if the store does not know.
        """
        filesystem, folder = self._resolved
        info = filesystem.get_file_info(f"{folder}/{name}")
        return info.size, info.mtime_ns

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for random access (`read_at`), which several threads may use at a time.

        Reads that an object store throttles are repeated. Raises SpecialFile for a device or a named pipe.
        """
        filesystem, folder = self._resolved
        self.refuse_special(name)
        if self.is_local:
            return filesystem.open_input_file(f"{folder}/{name}")
        return storage.open_retried(filesystem, f"{folder}/{name}")

    def refuse_special(self, name: str) -> None:
        """Raise SpecialFile if a file on this machine is a device, named pipe or socket, or a link to one."""
        if self.is_local:
            refuse_special_file(os.path.join(self._resolved[1], name), f"images.path: {self.path(name)}")

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Return the content of a file.

        Raises FileNotFoundError or PermissionError, SpecialFile for a device or a named pipe, and FileTooLarge for more
        than `max_bytes`; all without the path in the message. The message is written to the quarantine, which must not
        depend on where the images are stored.
        """
        try:
            if self.is_local:
                return read_regular(os.path.join(self._resolved[1], name), max_bytes, "the file")
            with self.open(name) as file:
                refuse_too_large(file.size(), max_bytes, "the file")
                return file.read()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)("the file is listed, and cannot be opened") from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise FileNotFoundError("the file is listed, and is a link to itself") from error

    def read_named(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Return the content of a table or description; errors are InvalidInput and NotFound and name the file."""
        try:
            return self.read(name, max_bytes)
        except (FileNotFoundError, PermissionError) as error:
            kind = NotFound if isinstance(error, FileNotFoundError) else InvalidInput
            raise kind(f"images.path: {self.path(name)}: {error}", "", "check that you may read it") from error
        except (SpecialFile, FileTooLarge) as error:
            found = error.found.replace("the file", f"images.path: {self.path(name)}", 1)
            raise type(error)(found, error.expected, error.do) from error

    def read_json(self, name: str) -> Any:
        """Parse a JSON file that describes a data set. Raises InvalidInput if it is none."""
        try:
            return json.loads(self.read_named(name, MAX_DESCRIPTION_BYTES))
        except (ValueError, RecursionError) as error:
            if isinstance(error, RayditError):
                raise
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise InvalidInput(
                f"images.path: {self.path(name)}: found no JSON ({reason})", "", "copy the file again"
            ) from error

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | Exception]:
        """Yield the content of each file in order, or the exception if it is missing, not readable, or no regular file.

        In an object store, several files are read ahead.
        """

        def attempt(name: str) -> bytes | Exception:
            try:
                return self.read(name)
            except (FileNotFoundError, PermissionError, SpecialFile, FileTooLarge) as error:
                return error

        return self.map_names(attempt, names)

    def map_names(self, function: Callable[[str], Result], names: Iterable[str]) -> Iterator[Result]:
        """Yield function(name) in order; in an object store, several calls run ahead in threads."""
        if self.is_local:
            return map(function, names)
        # Twice as many as there are threads, so that these are busy while the caller decodes.
        return storage.map_ahead(function, names, 2 * storage.MAX_CONCURRENT_REQUESTS)


def _walk(
    folder: str, skip_unreadable: bool, prefix: str = "", parents: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """Yield (relative name, length) of the files in a folder and its subfolders, following links to folders."""
    parents = enter_folder(folder, parents)
    for entry in _scan(folder, skip_unreadable and bool(prefix)):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, skip_unreadable, f"{prefix}{entry.name}/", parents)
        elif _is_file(entry):
            yield prefix + entry.name, entry.stat().st_size
        else:
            yield prefix + entry.name, 0  # a dead link, a device or a pipe: listed, so that reading it reports it


def _scan(folder: str, skip_unreadable: bool = False) -> Iterator[os.DirEntry]:
    """Yield the entries of a folder. Raises InvalidInput if it may not be read, unless it is to be skipped."""
    try:
        entries = os.scandir(folder)
    except PermissionError as error:
        if skip_unreadable or os.path.basename(folder) == LOST_AND_FOUND:
            return
        raise InvalidInput(
            f"images.path: found the folder {folder}, which may not be read",
            "read access to every image in it",
            "make it readable, or move it away",
        ) from error
    with entries:
        yield from entries


def enter_folder(folder: str, parents: tuple[str, ...]) -> tuple[str, ...]:
    """Return the real paths of a folder on disk and of those that lead to it, in which links cannot go round.

    parents: the latter. Raises InvalidInput if the folder is one of them, which a link leads to.
    """
    real = os.path.realpath(folder)
    if real in parents:
        raise InvalidInput(f"images.path: {folder} is a link to one of its parent folders", "", "remove the link")
    return (*parents, real)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


@dataclass(frozen=True)
class ImagesPath:
    """What images.path points to: a folder, or one file in a folder."""

    files: Files
    """The folder, or the file's folder."""
    name: str | None = None
    """Name of the file; None for a folder."""

    @cached_property
    def folders(self) -> list[str]:
        """Sorted names of the folders directly in the folder."""
        return self._top[0]

    @cached_property
    def names(self) -> list[str]:
        """Sorted names of the files directly in the folder."""
        return self._top[1]

    @cached_property
    def _top(self) -> tuple[list[str], list[str]]:
        return self.files.list_top()

    def require_folder(self, format: str) -> Files:
        """Return the files of the folder. Raises InvalidInput for a file, which the format cannot be."""
        if self.name is not None:
            raise InvalidInput(
                f'images.path: found the file {self} with images.format = "{format}"',
                "a folder",
                "set images.path to the folder, or leave images.format out",
            )
        return self.files

    def __str__(self) -> str:
        return self.files.path(self.name) if self.name else self.files.root


def find_images_path(path: str) -> ImagesPath:
    """Look up a path or URI. Raises NotFound, suggesting the closest existing name, if nothing is there."""
    path = storage.local_path(path) if storage.is_local(path) else path
    filesystem, inner = storage.resolve(path)
    kind = filesystem.get_file_info(inner).type
    if kind == FileType.Directory:
        return ImagesPath(Files(path))
    if kind == FileType.File:
        folder, name = storage.split(path)
        return ImagesPath(Files(folder), name)
    if storage.is_local(path):
        refuse_special_file(path, f"images.path: {path}")
    raise NotFound(
        f"images.path: found nothing at {path}{_suggest(path)}",
        "a folder of images, a Parquet or tar file, a table of labels, a Hugging Face data set, a URI of one of them "
        '(s3://, gs://), or "digits"',
        "correct images.path",
    )


def _suggest(path: str) -> str:
    """Return ' (did you mean "..."?)' if a similar local name exists, else an empty string."""
    if not storage.is_local(path):
        return ""
    missing = storage.local_path(path)
    while not os.path.isdir(os.path.dirname(missing)):
        missing = os.path.dirname(missing)
    close = difflib.get_close_matches(os.path.basename(missing), os.listdir(os.path.dirname(missing)), n=1)
    return f' (did you mean "{os.path.join(os.path.dirname(missing), close[0])}"?)' if close else ""
