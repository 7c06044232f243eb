"""What the user hears of the delivery to MLflow: one line for what waits, one for what was refused."""

import shlex
from pathlib import Path

from cluster import storage
from pipelines.artifacts import digest_of
from pipelines.console import say
from pipelines.tracking.journal import Entry, Journal, count_undelivered, refused_path
from pipelines.tracking.mlflow_writer import MlflowWriter

JOURNAL_FOLDER = ".tracking"


def journal_path(output: str, uri: str, part: str = "") -> Path:
    """Return the file of an output's journal for a tracking URI. part: see Tracker.open."""
    folder = storage.local_folder_for(storage.join(storage.absolute(output), JOURNAL_FOLDER))
    return Path(folder) / f"{part and part + '-'}{digest_of(uri)[:12]}.jsonl"


class Delivery(MlflowWriter):
    """Delivers a journal to MLflow and says what waits and what was refused, in one line each.

    The server of a journal: see pipelines.tracking.journal.Server.
    """

    def __init__(self, uri: str, output: str, part: str = ""):
        """output: folder or URI of the recipe's output. part: see Tracker.open."""
        super().__init__(uri, lambda text: say("tracking", text))
        self._output = output
        self._path = journal_path(output, uri, part)
        self.num_refused = 0
        self.is_away = False
        """Whether the store has once taken nothing."""

    def open_journal(self) -> Journal:
        """Open the journal, whose delivery begins at once."""
        return Journal(self._path, self, self._uri)

    @property
    def command(self) -> str:
        """The command that delivers what waits."""
        return f"raydit runs deliver {shlex.quote(self._output)}"

    def on_unavailable(self, reason: str) -> None:
        self.is_away = True
        say("tracking", f"{self._uri} {reason}; results are kept until it takes them, and work does not wait")

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
