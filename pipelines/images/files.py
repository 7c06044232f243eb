"""The files of a source: below a folder on disk, or below a prefix of an object store."""

import difflib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileType

from cluster import storage

READERS = 16
"""Requests to an object store at a time; each waits some tens of milliseconds."""

Result = TypeVar("Result")


class Files:
    """Names relative to a root, their lengths and their content. Hidden files and folders are left out."""

    def __init__(self, root: str):
        self.root = root

    def __repr__(self) -> str:
        return f"Files({self.root!r})"

    @property
    def is_local(self) -> bool:
        return storage.is_local(self.root)

    @cached_property
    def _place(self):
        return storage.resolve(self.root)

    def path(self, name: str) -> str:
        """Where a file is, for messages."""
        return storage.join(self.root, name)

    def below(self, name: str) -> "Files":
        return Files(storage.join(self.root, name)) if name else self

    def listing(self) -> tuple[list[str], np.ndarray]:
        """Sorted names of all files, in folders within folders too, and their lengths in bytes (int64)."""
        filesystem, inner = self._place
        if self.is_local:
            pairs = sorted(_walk(inner))
        else:
            infos = filesystem.get_file_info(FileSelector(inner, recursive=True))
            start = len(inner.rstrip("/")) + 1
            pairs = sorted((info.path[start:], info.size) for info in infos if info.type == FileType.File)
            pairs = [pair for pair in pairs if "/." not in "/" + pair[0]]
        names = [name for name, _ in pairs]
        self._check_text(names)
        return names, np.array([size for _, size in pairs], np.int64)

    def _check_text(self, names: list[str]) -> None:
        try:
            "".join(names).encode()
        except UnicodeEncodeError as error:
            wrong = next(
                name for name in names if not name.isascii() and name != name.encode(errors="replace").decode()
            )
            raise ValueError(
                f"images.path: found the file name {os.fsencode(wrong)!r} in {self.root}, expected UTF-8; rename it"
            ) from error

    def top(self) -> tuple[list[str], list[str]]:
        """Sorted names of the folders and of the files directly below the root."""
        filesystem, inner = self._place
        if self.root.startswith(("gs://", "gcs://")):
            # pyarrow shows no folder there that it has not made itself: they are read off the names of the files.
            below = {name.partition("/")[::2] for name in self.listing()[0]}
            kinds = list({(name, bool(rest)) for name, rest in below})
        elif self.is_local:
            with os.scandir(inner) as entries:
                kinds = [(entry.name, entry.is_dir()) for entry in entries]
        else:
            infos = filesystem.get_file_info(FileSelector(inner))
            kinds = [(info.base_name, info.type == FileType.Directory) for info in infos]
        shown = sorted((name, folder) for name, folder in kinds if not name.startswith("."))
        return [name for name, folder in shown if folder], [name for name, folder in shown if not folder]

    def open(self, name: str) -> pa.NativeFile:
        """A file that can be read anywhere (`read_at`), by several threads at a time."""
        filesystem, inner = self._place
        return filesystem.open_input_file(f"{inner}/{name}")

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError and PermissionError in words without the place."""
        try:
            if self.is_local:
                with open(os.path.join(self._place[1], name), "rb") as file:
                    return file.read()
            with self.open(name) as file:
                return file.read()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)("the file is listed, and cannot be opened") from error

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | Exception]:
        """All bytes of each file in order; from an object store, several at a time ahead of their use."""

        def attempt(name: str) -> bytes | Exception:
            try:
                return self.read(name)
            except (FileNotFoundError, PermissionError) as error:
                return error

        return self.each(attempt, names)

    def each(self, function: Callable[[str], Result], names: Iterable[str]) -> Iterator[Result]:
        """function(name) in order; where files are far away, several at a time ahead of their use."""
        if self.is_local:
            yield from map(function, names)
            return
        with ThreadPoolExecutor(READERS) as pool:
            waiting: deque = deque()
            for name in names:
                waiting.append(pool.submit(function, name))
                if len(waiting) == 2 * READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _walk(folder: str, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """(relative name, length) of the files below a folder; links to folders are followed."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"images.path: {folder} is a link to a folder above itself; remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size
            elif entry.is_symlink():
                yield prefix + entry.name, 0  # it points to nothing, which is said when it is read


def locate(path: str) -> tuple[Files, str | None]:
    """Folder of `path`, and the file in it that is meant, if `path` is a file.

    Raises FileNotFoundError, with the nearest name that is there.
    """
    path = storage.local_path(path) if storage.is_local(path) else path
    filesystem, inner = storage.resolve(path)
    kind = filesystem.get_file_info(inner).type
    if kind == FileType.Directory:
        return Files(path), None
    if kind == FileType.File:
        folder, name = _parent(path)
        return Files(folder), name
    raise FileNotFoundError(
        f"images.path: nothing at {path}{_nearest(path)}; expected a folder of images, a Parquet or tar file, a table "
        'of labels, a Hugging Face data set, a URI of one of them (s3://, gs://), or "digits"'
    )


def _parent(path: str) -> tuple[str, str]:
    stem, question_mark, query = path.partition("?") if not storage.is_local(path) else (path, "", "")
    folder, _, name = stem.rstrip("/").rpartition("/")
    return (folder or ("/" if stem.startswith("/") else ".")) + question_mark + query, name


def _nearest(path: str) -> str:
    """What a misspelt local path may have meant."""
    if not storage.is_local(path):
        return ""
    missing = storage.local_path(path)
    while not os.path.isdir(os.path.dirname(missing)):
        missing = os.path.dirname(missing)
    close = difflib.get_close_matches(os.path.basename(missing), os.listdir(os.path.dirname(missing)), n=1)
    return f' (did you mean "{os.path.join(os.path.dirname(missing), close[0])}"?)' if close else ""
