"""Repair a database that was moved or copied with its project: where its artifacts, outputs and journals are now.

MLflow's API cannot change where artifacts lie, so this writes to the database itself, in one transaction.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from cluster.storage.lease import hold_folder
from pipelines.artifacts import digest_of
from pipelines.tracking import tags
from pipelines.tracking.database import SQLITE, database_folder
from pipelines.tracking.journal import files_of, merge_journals
from pipelines.tracking.journal_folder import journal_folder, refuse_others
from pipelines.tracking.moved_store import earlier_folders
from raydit.errors import Unreachable

ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that say where artifacts lie."""
TAG_COLUMNS = (
    ("tags", "key", "value"),
    ("logged_model_tags", "tag_key", "tag_value"),
    ("model_version_tags", "key", "value"),
)
PATH_TAGS = (tags.OUTPUT, tags.CHECKPOINT, tags.LATENTS, tags.IMAGES)


class Move(NamedTuple):
    """A folder that was moved or copied."""

    old: str
    new: str

    def new_path(self, path: str) -> str:
        """Return a path or file URI in the new folder, if it is in the old one."""
        scheme = "file://" if path.startswith("file://") else ""
        below = path.removeprefix(scheme)
        return f"{scheme}{self.new}{below[len(self.old) :]}" if _is_in(below, self.old) else path


class Relocated(NamedTuple):
    """What a relocation has repaired."""

    old: str
    new: str
    artifacts: int
    """Locations of artifacts in the database."""
    paths: int
    """Paths of outputs, checkpoints, latents and data sets in the database."""
    journals: int


def relocate(uri: str, outputs: Iterable[str] = ()) -> list[Relocated]:
    """Make a database, and the journals of the outputs that it names, lead to where they are now.

    outputs: further outputs with journals for this database. Returns what was repaired for each folder in which the
    database has been; an empty list if it has not moved. Raises InUse if another process works in one of the outputs,
    Unreachable if the database is locked, and InvalidInput for a journal that another user wrote.
    """
    folder = database_folder(uri)
    found = []
    for old in earlier_folders(uri):
        move = Move(old, str(folder))
        with ExitStack() as held:
            known = {*map(storage.absolute, outputs), *(_prefer_new(move, each) for each in _outputs(uri))}
            journals = {output: _journals(output, uri, move) for output in sorted(known)}
            for output in [output for output in journals if journals[output]]:
                held.enter_context(hold_folder(output, on_lost=lambda reason: None))
                for path in journals[output]:
                    refuse_others(files_of(path))  # merging would make the lines this user's own
            # The database comes last: until it is repaired, a command that was killed finishes when it is repeated.
            moved = [path for paths in journals.values() for path in paths]
            for path in moved:
                _mend_journal(path, uri, move)
            try:
                artifacts, paths = _mend_database(uri, move)
            except sqlite3.OperationalError as error:
                raise Unreachable(
                    f"{uri} cannot be changed: {error}", "", "run the command again a little later"
                ) from error
        found.append(Relocated(old, move.new, artifacts, paths, len(moved)))
    return found


def _outputs(uri: str) -> list[str]:
    with closing(sqlite3.connect(uri.removeprefix(SQLITE))) as database:
        query = "SELECT DISTINCT value FROM tags WHERE key = ?"
        return [value for (value,) in database.execute(query, (tags.OUTPUT,))]


def _mend_database(uri: str, move: Move) -> tuple[int, int]:
    """Return how many artifact locations, and how many other paths, were replaced."""
    with storage.lock(str(database_folder(uri))), closing(sqlite3.connect(uri.removeprefix(SQLITE))) as database:
        with database:  # one transaction
            artifacts = sum(_replace(database, table, column, move.new_path) for table, column in ARTIFACT_COLUMNS)
            paths = 0
            for table, key, column in TAG_COLUMNS:
                marks = ", ".join("?" * len(PATH_TAGS))
                paths += _replace(database, table, column, lambda path: _prefer_new(move, path), f"{key} IN ({marks})")
            paths += _replace(database, "datasets", "dataset_source", lambda source: _moved_source(move, source))
    return artifacts, paths


def _replace(
    database: sqlite3.Connection, table: str, column: str, change: Callable[[str], str], where: str = "1"
) -> int:
    """Replace the values of a column by those that `change` returns; return how many rows changed."""
    parameters = PATH_TAGS if where != "1" else ()
    query = f"SELECT rowid, {column} FROM {table} WHERE {where} AND {column} IS NOT NULL"
    rows = [(change(value), rowid, value) for rowid, value in database.execute(query, parameters)]
    changed = [(new, rowid) for new, rowid, value in rows if new != value]
    database.executemany(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", changed)
    return len(changed)


def _prefer_new(move: Move, path: str) -> str:
    """Return a path in the new folder, unless only the old one has it: outputs may have stayed where they were."""
    new = move.new_path(path)
    return path if os.path.exists(path) and not os.path.exists(new) else new


def _moved_source(move: Move, source: str) -> str:
    """Return the source of a data set, JSON with a URI, with its path in the new folder."""
    try:
        content = json.loads(source)
    except ValueError:
        return source
    if not isinstance(content, dict) or not isinstance(content.get("uri"), str):
        return source
    return json.dumps({**content, "uri": _prefer_new(move, content["uri"])})


def _journals(output: str, uri: str, move: Move) -> list[Path]:
    """Return the journals of an output that are named after the database's old URI."""
    folder, digest = journal_folder(output), _old_digest(uri, move)
    return sorted([*folder.glob(f"{digest}.jsonl"), *folder.glob(f"*-{digest}.jsonl")])


def _mend_journal(path: Path, uri: str, move: Move) -> None:
    """Give a journal the name that follows from the database's new URI."""
    target = path.with_name(path.name.replace(_old_digest(uri, move), digest_of(uri)[:12]))
    merge_journals(path, target, uri, lambda line: _moved_line(move, line))


def _old_digest(uri: str, move: Move) -> str:
    """Return the part of a journal's name that stands for the database's old URI."""
    return digest_of(f"{SQLITE}{move.old}/{Path(uri).name}")[:12]


def _moved_line(move: Move, line: bytes) -> bytes:
    """Return a line of JSON in which every text that is a path in the old folder is one in the new folder.

    What is not JSON stays as it is, for the journal to set aside.
    """

    def moved(value: object) -> object:
        if isinstance(value, str):
            return _prefer_new(move, value) if _is_in(value, move.old) else value
        if isinstance(value, list):
            return [moved(each) for each in value]
        return {key: moved(each) for key, each in value.items()} if isinstance(value, dict) else value

    try:
        return json.dumps(moved(json.loads(line))).encode() + b"\n"
    except (ValueError, RecursionError):
        return line


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
