"""A durable queue of entries for a server: appended at once, delivered in order when the server answers.

The journal outlives the process and the server: what is left is delivered by the next process that opens it.
"""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import storage

Entry = dict[str, Any]
"""A JSON object with at least `op`, the kind of entry, and `run`, the run that it is about."""


class Journal:
    """An append-only JSON Lines file, and a thread that hands its entries to `deliver`, in order.

    `deliver(entries, ids)` delivers one or more entries from the front and returns how many. In `ids`, which is kept
    beside the journal, it notes the server's ids that later entries need. It raises ConnectionError while the server
    is unavailable; `on_unavailable` is then called once with the reason.
    """

    RETRY_SECONDS = (1, 2, 4, 8, 15, 30)

    def __init__(
        self, path: Path, deliver: Callable[[list[Entry], dict[str, str]], int], on_unavailable: Callable[[str], None]
    ):
        self.path = path
        self._state_path = path.with_suffix(".state.json")
        self._deliver, self._on_unavailable = deliver, on_unavailable
        path.parent.mkdir(parents=True, exist_ok=True)
        self._truncate_torn_line()
        self._file = open(path, "ab")
        self._state: dict[str, Any] = (
            json.loads(self._state_path.read_text()) if self._state_path.exists() else {"offset": 0, "known": {}}
        )
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def _truncate_torn_line(self) -> None:
        """Remove the half line that a process leaves when it is killed while appending."""
        if self.path.exists():
            data = self.path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                os.truncate(self.path, end)

    def entries(self) -> list[Entry]:
        """Return all entries that were ever appended."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def append(self, entry: Entry) -> None:
        """Keep an entry. It is on disk when this returns, and delivered later."""
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
        self._wake.set()

    @property
    def undelivered(self) -> bool:
        """Whether any entry still waits for delivery."""
        return self._state["offset"] < self.path.stat().st_size

    def close(self, timeout_seconds: float) -> bool:
        """Deliver what is left, waiting at most this long. Return whether everything was delivered."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        self._file.close()
        return not self.undelivered

    def _run(self) -> None:
        attempts = 0
        while True:
            closing = self._closing.is_set()  # read before the file, so that the last entries are not missed
            lines = self._next_lines()
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
                    self._on_unavailable(str(error))
                elif self._closing.is_set():
                    return
                self._closing.wait(self.RETRY_SECONDS[min(attempts, len(self.RETRY_SECONDS) - 1)])
                attempts += 1
            else:
                attempts = 0
                self._state["offset"] += sum(map(len, lines[:count]))
                storage.write_json_atomically(str(self._state_path), self._state)

    def _next_lines(self) -> list[bytes]:
        """Return complete lines from the delivery offset on, about a mebibyte of them."""
        with open(self.path, "rb") as file:
            file.seek(self._state["offset"])
            lines = (file.read(1 << 20) + file.readline()).splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n")]
