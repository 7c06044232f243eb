"""A durable list of things to tell a server: appended at once, delivered when the server answers.

The journal outlives the process and the server: what was appended is delivered in order, by this process or by
the next one that opens the same journal.
"""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import storage

Entry = dict


class Journal:
    """An append-only JSON Lines file, and a thread that hands its entries to `deliver`, in order.

    `deliver(entries, known)` delivers one or more from the front and returns how many; in `known` (plain data, kept
    beside the journal) it notes what later entries need. It raises ConnectionError while the server is away.
    """

    RETRY_SECONDS = (1, 2, 4, 8, 15, 30)

    def __init__(self, path: Path, deliver: Callable[[list[Entry], dict], int], away: Callable[[str], None]):
        self.path = path
        self._state_path = path.with_suffix(".state.json")
        self._deliver, self._away = deliver, away
        path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self._file = open(path, "ab")
        self._state: dict[str, Any] = (
            json.loads(self._state_path.read_text()) if self._state_path.exists() else {"offset": 0, "known": {}}
        )
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._courier = threading.Thread(target=self._run, name="journal", daemon=True)
        self._courier.start()

    def _cut_torn_line(self) -> None:
        """A process killed while it appended leaves half a line, which would corrupt the next."""
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)

    def entries(self) -> list[Entry]:
        """All entries ever appended."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def append(self, entry: Entry) -> None:
        """Keep an entry; it is on its way when this returns, not delivered."""
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
        self._wake.set()

    @property
    def undelivered(self) -> bool:
        return self._state["offset"] < self.path.stat().st_size

    def close(self, timeout_seconds: float) -> bool:
        """Deliver what is left, waiting at most so long. True if nothing is left."""
        self._closing.set()
        self._wake.set()
        self._courier.join(timeout_seconds)
        self._file.close()
        return not self.undelivered

    def _run(self) -> None:
        attempts = 0
        while True:
            closing = self._closing.is_set()  # before reading: what was appended last is read then
            lines = self._next()
            if not lines:
                if closing:
                    return
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                count = self._deliver([json.loads(line) for line in lines], self._state["known"])
            except ConnectionError as error:
                if attempts == 0:
                    self._away(str(error))
                elif self._closing.is_set():
                    return
                self._closing.wait(self.RETRY_SECONDS[min(attempts, len(self.RETRY_SECONDS) - 1)])
                attempts += 1
            else:
                attempts = 0
                self._state["offset"] += sum(map(len, lines[:count]))
                storage.write_json_atomically(str(self._state_path), self._state)

    def _next(self) -> list[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self._state["offset"])
            lines = (file.read(1 << 20) + file.readline()).splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n")]
