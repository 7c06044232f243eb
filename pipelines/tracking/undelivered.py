"""Entries that are still undelivered in an output's journals, and their delivery by `raydit runs deliver`."""

import re
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from cluster.storage.lease import hold_folder
from pipelines.artifacts import digest_of
from pipelines.tracking.delivery import Delivery
from pipelines.tracking.journal import count_undelivered, files_of, read_uri, refused_path
from pipelines.tracking.journal_folder import JOURNAL_FOLDER, journal_folder, refuse_others
from pipelines.tracking.provenance import RECIPE_FILE
from pipelines.tracking.store import refuse_unusable, tracking_uri
from pipelines.tracking.tracker import CLOSE_SECONDS
from raydit.errors import NotFound


class JournalFile(NamedTuple):
    """A journal of an output."""

    path: Path
    part: str
    """Folder of the output that the journal is of; empty: the output itself."""
    uri: str | None
    """Tracking URI of the store; None if it is unknown."""

    @property
    def refused(self) -> Path:
        """The file of the entries that were set aside."""
        return refused_path(self.path)

    @property
    def waits(self) -> bool:
        """Whether entries wait for delivery, or were set aside."""
        return count_undelivered(self.path) > 0 or self.refused.exists()


class Delivered(NamedTuple):
    """What became of a journal's entries."""

    uri: str
    delivered: int
    waiting: int
    refused: int
    """Entries that MLflow refuses, which stay beside the journal."""


def find_outputs(folder: Path) -> list[str]:
    """Return the outputs with journals in a folder and up to two levels below it."""
    found = [each.parent for depth in ("", "*/", "*/*/") for each in folder.glob(f"{depth}{JOURNAL_FOLDER}")]
    return sorted(map(str, found))


def find_journals(output: str, uri: str = "") -> Iterator[JournalFile]:
    """Yield this user's journals of an output. uri: a tracking URI that one may be of, besides those that it records.

    Raises InvalidInput for a journal among them that another user wrote.
    """
    folder = journal_folder(output)
    recipes = [tomllib.loads(file.read_text()) for file in sorted(folder.glob(f"*/{RECIPE_FILE}"))]
    known = [uri, *(recipe.get("tracking", {}).get("uri", "") for recipe in recipes)]
    by_digest = {digest_of(each)[:12]: each for each in map(tracking_uri, known)}
    for path in sorted(folder.glob("*.jsonl")):
        if match := re.fullmatch(r"(?:(.+)-)?([0-9a-f]{12})\.jsonl", path.name):
            refuse_others(files_of(path))
            yield JournalFile(path, match[1] or "", read_uri(path) or by_digest.get(match[2]))


def deliver_journal(output: str, journal: JournalFile) -> Delivered:
    """Deliver what waits in a journal, and send again what MLflow refused before.

    Raises InUse if another process, which delivers it, works in the output, InvalidInput if the store will never take
    runs, and NotFound if it is unknown which store the journal is for.
    """
    if journal.uri is None:
        raise NotFound(
            f"{journal.path}: found no record of the store that it is for",
            "",
            "give the recipe instead of its output, or set MLFLOW_TRACKING_URI to that store",
        )
    with hold_folder(storage.join(output, journal.part) if journal.part else output, on_lost=lambda reason: None):
        refuse_unusable(journal.uri)
        delivery = Delivery(journal.uri, output, journal.part)
        before = count_undelivered(journal.path)
        opened = delivery.open_journal()
        while opened.is_delivering and not delivery.is_away:
            time.sleep(0.05)
        opened.close(CLOSE_SECONDS)
        newly_refused, waiting = delivery.num_refused, count_undelivered(journal.path)
        taken, kept = opened.retry_refused()
    return Delivered(journal.uri, before - waiting - newly_refused + taken, waiting, kept)
