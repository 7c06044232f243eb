"""Path strings: a folder or file on a local disk, or a URI (s3://, gs://, file://), and the file system of each."""

import hashlib
import os
import urllib.parse
from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem

from cluster.credentials import refuse_password
from cluster.job_package import is_job_folder
from cluster.storage.object_stores import resolve_in_bucket
from cluster.storage.ownership import others_files
from raydit.errors import InvalidInput

MAX_PATH_LENGTH = 8192
"""Longest path or URI: systems allow paths of 4,096 bytes, and object stores keys of 1,024."""


def is_local(path: str) -> bool:
    """Return whether a path is on a disk of this machine: a plain path or a file:// URI."""
    return "://" not in path or path.startswith("file://")


def join(base: str, *parts: str) -> str:
    """Join a folder and names below it; the query of a URI (?endpoint_override=...) stays at the end.

    Characters of the names that have a meaning in a URI are escaped there.
    """
    below = [part.strip("/") for part in parts]
    if "://" not in base:
        return os.path.join(base, *below)
    escaped = [part.replace("%", "%25").replace("#", "%23").replace("?", "%3F") for part in below]
    stem, question_mark, query = base.partition("?")
    return "/".join([stem.rstrip("/"), *escaped]) + question_mark + query


def quoted(path: str) -> str:
    """Return a URI as every tool reads it, with blanks and the like in its path written as %20; local paths unchanged.

    raydit itself takes them either way.
    """
    if "://" not in path:
        return path
    url = urllib.parse.urlsplit(path)
    return url._replace(path=urllib.parse.quote(urllib.parse.unquote(url.path))).geturl()


def split(path: str) -> tuple[str, str]:
    """Split a path into its parent folder and its name, so that join(*split(path)) is the same file or folder."""
    if "://" not in path:
        folder, slash, name = path.rstrip("/").rpartition("/")
        return folder or slash, name
    stem, question_mark, query = path.partition("?")
    folder, _, name = stem.rstrip("/").rpartition("/")
    return folder + question_mark + query, urllib.parse.unquote(name)


def absolute(path: str) -> str:
    """Return a path that means the same in every working directory: an absolute local path, or the URI unchanged."""
    return local_path(path) if is_local(path) else path


def local_path(path: str) -> str:
    """Return the absolute path on disk of a local path or file:// URI."""
    assert is_local(path), f"{path} is not on a local disk"
    return resolve(path)[1]


def resolve(path: str) -> tuple[FileSystem, str]:
    """Return the pyarrow file system of a path, and the path inside that file system.

    Raises InvalidInput for a URI that pyarrow cannot open or that contains a password, and for one that is too long.
    """
    if len(path) > MAX_PATH_LENGTH:
        raise InvalidInput(
            f"path: found {path[:100]!r}... of {len(path):,} characters",
            f"at most {MAX_PATH_LENGTH:,}",
            "correct the path",
        )
    if "://" not in path:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    refuse_password("path", path)
    if "#" in path:  # a URI ends there, and another file would be opened
        raise InvalidInput(f"path: found {path!r}, a URI with a #", "%23 instead", "write # as %23")
    try:
        return resolve_in_bucket(path) or FileSystem.from_uri(quoted(path))
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise InvalidInput(
            f"path: found {path!r}",
            "a local path or a URI that pyarrow.fs opens (s3://BUCKET/KEY, gs://BUCKET/KEY, file:///FOLDER)",
            f"correct the path (pyarrow reports: {error})",
        ) from error


def nearest_folder(path: str) -> str:
    """Return a local path itself, or its nearest parent folder that exists."""
    folder = Path(local_path(path))
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


def refuse_file_on_the_way(path: str) -> None:
    """Raise InvalidInput if a local path leads through a file, or to one, so that no folder can be there."""
    if not is_local(path):
        return
    folder = Path(local_path(path))
    found = next(each for each in (folder, *folder.parents) if each.exists())
    if not found.is_dir():
        raise InvalidInput(
            f"{path}: found a file at {found}", "a folder, or a path where nothing is yet", "choose another path"
        )


def refuse_job_folder(path: str) -> None:
    """Raise InvalidInput for an output in the folder of a job, which Ray deletes at the job's end."""
    if is_local(path) and is_job_folder(Path(local_path(path))):
        raise InvalidInput(
            f"{local_path(path)}: found an output in a folder that Ray deletes after the job",
            "a path that outlives the job",
            "use a URI (s3://BUCKET/...) or the absolute path of a mount that all nodes of the cluster share",
        )


def local_folder_for(path: str) -> str:
    """Return a local folder for files that can only be on a disk.

    It is the path itself if that is local, and otherwise a folder in the cache that belongs to this URI alone.
    """
    if is_local(path):
        return local_path(path)
    return os.path.join(cache_folder("beside"), hashlib.sha256(path.encode()).hexdigest()[:16])


def cache_folder(kind: str) -> str:
    """Return the folder in which this user caches one kind of file that can be downloaded or computed again.

    What is in it is used without asking where it came from. So where XDG_CACHE_HOME is shared, and another user has
    made the folder, it is one beside that.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "raydit", kind)
    return f"{folder}-user-{os.geteuid()}" if others_files([folder]) else folder
