"""A database that was moved or copied together with its artifacts, whose locations MLflow records as absolute paths.

MLflow would write to the old path, which it makes again, or into the project that was copied.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from pipelines.tracking.database import SQLITE, database_folder, is_absent
from raydit.errors import InvalidInput

ARTIFACTS = "mlruns"
"""Folder of artifacts beside a database."""


def refuse_moved(uri: str) -> None:
    """Raise InvalidInput for a database that was moved or copied since its experiments were created."""
    if folders := earlier_folders(uri):
        raise InvalidInput(
            f"tracking.uri: {uri} was moved or copied: found artifacts of its runs recorded in {folders[0]}",
            f"in {database_folder(uri)}, where they are now",
            "run: raydit runs relocate",
        )


def earlier_folders(uri: str) -> list[str]:
    """Return the folders in which a database lay when its experiments were created, if it was moved since.

    An experiment whose artifacts lie elsewhere on purpose, or whose folder is known by two paths, does not count.
    """
    here = database_folder(uri)
    if here is None or is_absent(uri):
        return []
    return sorted({folder for folder in _recorded_folders(uri) if not _is_same(folder, here)})


def _recorded_folders(uri: str) -> Iterator[str]:
    """Yield the parents of the artifacts' folders of those experiments whose artifacts lie beside the database now."""
    file = Path(uri.removeprefix(SQLITE)).absolute()
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=1)) as database:
            experiments = database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
            for experiment, location in experiments:
                path = Path((location or "").removeprefix("file://"))
                if path.name != ARTIFACTS or not path.is_absolute():
                    continue
                query = "SELECT run_uuid FROM runs WHERE experiment_id = ? LIMIT 50"
                runs = [run for (run,) in database.execute(query, (experiment,))]
                if any((file.parent / ARTIFACTS / run).exists() for run in runs) or not path.parent.exists():
                    yield str(path.parent)
    except sqlite3.Error:  # locked, or no database of MLflow: for whoever asks MLflow to find out
        return


def _is_same(folder: str, here: Path) -> bool:
    return os.path.exists(folder) and os.path.samefile(folder, here)
