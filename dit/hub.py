"""Repositories on the Hugging Face hub, named by OWNER/NAME or, at one of their versions, by OWNER/NAME@REVISION."""

import re
from collections.abc import Sequence
from pathlib import Path

REVISION = r"(?!/)(?!.*\.\.)[\w./-]+"
"""Pattern of a branch, tag or commit. Not `..` and no `/` in front: huggingface_hub makes a path in its cache of it."""
COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(id: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION into the repository and its revision, which is None if the id names none.

    What has no valid revision behind an @ is returned as it is, for the hub's own error.
    """
    match = re.fullmatch(f"([^@]+)@({REVISION})", id)
    return (match[1], match[2]) if match else (id, None)


def fetch_snapshot(id: str, patterns: Sequence[str] | None = None, *, download: bool = True) -> Path:
    """Return the local folder of a repository's files: from the cache, or downloaded if `download`.

    patterns: shell patterns of the files; None for all. Raises the errors of huggingface_hub, of many kinds.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(id)
    allowed = None if patterns is None else list(patterns)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=allowed, local_files_only=not download))


def pin_commit(id: str, folder: Path) -> str:
    """Return OWNER/NAME@COMMIT of a folder in huggingface_hub's cache; an id of other folders stays as it is.

    A branch may move while a job runs, and its workers must all read what the job has seen.
    """
    commits = [part for part in folder.parts if COMMIT.fullmatch(part)]
    return f"{split_revision(id)[0]}@{commits[-1]}" if commits else id
