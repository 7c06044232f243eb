"""Notices about the delivery to MLflow: one for entries that are pending, one for entries that were refused."""

import shlex
from functools import partial

from pipelines.console import say
from pipelines.tracking.journal import Entry, Journal, count_undelivered, files_of, refused_path
from pipelines.tracking.journal_folder import find_sendable, journal_path, refuse_others
from pipelines.tracking.mlflow_writer import MlflowWriter


class Delivery(MlflowWriter):
    """Delivers a journal to MLflow and says what waits and what was refused, in one line each.

    The server of a journal: see pipelines.tracking.journal.Server.
    """

    def __init__(self, uri: str, output: str, part: str = ""):
        """output: folder or URI of the recipe's output. part: see Tracker.open."""
        self._path = path = journal_path(output, uri, part)
        super().__init__(uri, partial(say, "tracking"), lambda file: find_sendable(file, output, path.parent))
        self._output = output
        self.num_refused = 0
        self.is_away = False
        """Whether the store has failed to accept an entry at least once."""

    def open_journal(self) -> Journal:
        """Open the journal, whose delivery begins at once. Raises InvalidInput if another user wrote it."""
        refuse_others(files_of(self._path))
        return Journal(self._path, self, self._uri)

    @property
    def command(self) -> str:
        """The command that delivers what waits."""
        return f"raydit runs deliver {shlex.quote(self._output)}"

    def on_unavailable(self, reason: str) -> None:
        self.is_away = True
        say("tracking", f"{self._uri} {reason}; results are queued and will be sent later; work continues")

    def on_refused(self, entry: Entry, reason: str) -> None:
        self.num_refused += 1
        if self.num_refused == 1:
            say(
                "tracking",
                f"MLflow refuses {entry['op']} of {entry['run']}: {reason}. Such entries are kept in "
                f"{refused_path(self._path)}; when the cause is removed, `{self.command}` sends them again",
            )

    def say_what_is_left(self, journal: Journal) -> None:
        """Say how many entries wait and what delivers them, and how many were set aside."""
        if count := count_undelivered(journal.path):
            say(
                "tracking",
                f"{self._uri} has not taken everything yet: {count:,} {_entries(count)} in {journal.path}. "
                f"`{self.command}`, or the next raydit command with this output, delivers them",
            )
        if self.num_refused > 1:
            say("tracking", f"MLflow refused {self.num_refused:,} entries in all; the reasons are beside them")


def _entries(count: int) -> str:
    return "entry waits" if count == 1 else "entries wait"
