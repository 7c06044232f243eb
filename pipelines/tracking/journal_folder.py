"""Where an output's journals are, whose they are, and which files their entries may send.

A folder may be shared, and what a journal says is sent to MLflow with the rights of whoever runs raydit. So a user's
journals are those that the user wrote, and the files that they send lie in the output.
"""

import os
from pathlib import Path

from cluster import storage
from cluster.storage.ownership import others_files, owner_name
from pipelines.artifacts import digest_of
from raydit.errors import InvalidInput

JOURNAL_FOLDER = ".tracking"


def journal_folder(output: str) -> Path:
    """Return the folder of this user's journals for an output: JOURNAL_FOLDER, or one in it if another user made it.

    Raises InvalidInput if something of another user has that name.
    """
    folder = storage.local_folder_for(storage.join(storage.absolute(output), JOURNAL_FOLDER))
    if not others_files([folder]):
        return Path(folder)
    own = os.path.join(folder, f"user-{os.geteuid()}")
    if os.path.islink(folder):
        refuse_others([folder])
    refuse_others([own])
    return Path(own)


def journal_path(output: str, uri: str, part: str = "") -> Path:
    """Return the file of this user's journal of an output for a tracking URI. part: see Tracker.open."""
    return journal_folder(output) / f"{part and part + '-'}{digest_of(uri)[:12]}.jsonl"


def refuse_others(paths: list[str]) -> None:
    """Raise InvalidInput if one of the paths exists and another user made it."""
    for path in others_files(paths):
        raise InvalidInput(
            f"{path}: found a file of {owner_name(path)}",
            "a journal that you have written, because its entries are sent to MLflow with your rights",
            "remove it, or choose another output",
        )


def find_sendable(path: str, output: str, folder: Path) -> str | None:
    """Return the path by which to open a file that an entry names; None if the file does not exist.

    folder: the journal's. Raises InvalidInput for what is not a regular file in the output or in that folder; links are
    followed before this is decided.
    """
    if not storage.is_local(path):
        if not _is_below(path, output):
            raise _outside(path, output)
        return path if storage.exists(path) else None
    real = os.path.realpath(storage.local_path(path))
    roots = [str(folder), *([storage.local_path(output)] if storage.is_local(output) else [])]
    if not any(Path(real).is_relative_to(os.path.realpath(root)) for root in roots):
        raise _outside(path, output)
    if not os.path.exists(real):
        return None
    if not os.path.isfile(real):
        raise InvalidInput(f"{path}: found something else than a file", "a regular file", "remove it")
    return real


def _is_below(uri: str, output: str) -> bool:
    """Return whether a URI of an object store names something below an output in the same store."""
    (stem, _, query), (root, _, root_query) = uri.partition("?"), output.partition("?")
    return query == root_query and stem.startswith(f"{root.rstrip('/')}/") and ".." not in stem.split("/")


def _outside(path: str, output: str) -> InvalidInput:
    return InvalidInput(
        f"{path}: found a file outside of the output", f"one in {output}", "if you trust it, log it to the run yourself"
    )
