"""Paths that are a folder on disk or a URI (s3://, gs://, file://), and the file system behind each."""

import hashlib
import os
from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem

from cluster.credentials import refuse_password
from cluster.storage.object_stores import resolve_in_bucket


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


def nearest_folder(path: str) -> str:
    """The path itself or the nearest folder above it that exists on disk."""
    folder = Path(local_path(path))
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


def on_this_machine(path: str) -> str:
    """A local folder for what can only be on a disk: the place itself, or one in the cache that belongs to its URI."""
    if is_local(path):
        return local_path(path)
    return os.path.join(cache_folder("beside"), hashlib.sha256(path.encode()).hexdigest()[:16])


def cache_folder(kind: str) -> str:
    """Where this machine keeps what can be fetched or made again."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "raydit", kind)
