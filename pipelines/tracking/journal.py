"""A durable queue of entries for a server: appended at once, delivered in order when the server answers.

The journal outlives the process and the server: what is left is delivered by the next process that opens it.
"""

import json
import operator
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cluster import storage
from raydit.errors import InvalidInput

Entry = dict[str, Any]
"""A JSON object with at least `op`, the kind of entry, and `run`, the run that it is about."""

Ids = dict[str, str]
"""The server's ids that later entries need, by the journal's names of runs, experiments and models."""


class Refused(Exception):
    """The server answers, and will never take the first entry."""


class Server(Protocol):
    """What a journal delivers to, and reports to. Its methods are called by the journal's thread."""

    def deliver(self, entries: list[Entry], ids: Ids, history: Callable[[], list[Entry]]) -> int:
        """Deliver one or more entries from the front, note in `ids` what later entries need, and return how many.

        history: returns the entries that were delivered before. Raises ConnectionError if the same entries may be
        taken later, and Refused if the first one never will.
        """
        ...

    def on_unavailable(self, reason: str) -> None:
        """Hear that the server takes nothing at present; called once for each outage."""
        ...

    def on_refused(self, entry: Entry, reason: str) -> None:
        """Hear that an entry was set aside."""
        ...


class Journal:
    """An append-only JSON Lines file, and a thread that hands its entries to a server, in order.

    Its cursor moves past an entry only when the server has taken it, or when the entry has been set aside because the
    server never will: then it stands in a file beside the journal, from which `retry_refused` sends it again.
    """

    RETRY_SECONDS = (1, 2, 4, 8, 15, 30)
    MAX_BYTES = 1 << 20
    """Size of the entries that the server is given at once."""

    def __init__(self, path: Path, server: Server, uri: str = ""):
        """uri: address of the server, which is kept beside the journal."""
        self.path = path
        self._state_path = _state_path(path)
        self.refused_path = refused_path(path)
        self._server = server
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate_torn_line(path)
        _truncate_torn_line(self.refused_path)
        self._file = open(path, "ab")
        self._state = _read_state(path)
        self._is_saved = True
        self._num_bytes = self.MAX_BYTES
        self._last_refused = _last_refused(self.refused_path)
        if uri and self._state.get("uri") != uri:
            self._state["uri"] = uri
            self._save_state()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def entries(self) -> list[Entry]:
        """Return all entries that were ever appended."""
        return _read_lines(self.path.read_bytes())

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

    @property
    def is_delivering(self) -> bool:
        """Whether entries wait that may still be delivered: the thread has not ended, as after a bug."""
        return self.undelivered and self._thread.is_alive()

    def close(self, timeout_seconds: float) -> bool:
        """Deliver what is left, waiting at most this long. Return whether everything was delivered."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        self._file.close()
        return not self.undelivered

    def retry_refused(self) -> tuple[int, int]:
        """Send what was set aside again; return how many entries were taken now, and how many stay.

        To be called after `close`, when the thread has ended.
        """
        records = _read_refused(self.refused_path)
        kept = []
        for number, record in enumerate(records):
            try:
                self._server.deliver([record["entry"]], self._state["known"], self._history)
            except Refused as error:
                kept.append({**record, "reason": str(error)})
            except ConnectionError:
                kept += records[number:]
                break
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        if kept:
            storage.write_atomically(str(self.refused_path), lines.encode())
        else:
            self.refused_path.unlink(missing_ok=True)
        self._save_state()
        return len(records) - len(kept), len(kept)

    def _run(self) -> None:
        attempts = 0
        while True:
            closing = self._closing.is_set()  # read before the file, so that the last entries are not missed
            try:
                has_delivered = self._deliver_next()
            except OSError as error:  # the server is away, or the disk of the journal fails or is full
                if attempts == 0:
                    self._server.on_unavailable(_why_unavailable(error))
                elif self._closing.is_set():
                    return
                self._closing.wait(self.RETRY_SECONDS[min(attempts, len(self.RETRY_SECONDS) - 1)])
                attempts += 1
                continue
            attempts = 0
            if has_delivered:
                continue
            if closing:
                return
            self._wake.wait()
            self._wake.clear()

    def _deliver_next(self) -> bool:
        """Deliver entries from the cursor on, or set one aside, and move the cursor; return whether there were any.

        Raises OSError if that may succeed later.
        """
        if not self._is_saved:
            self._save_state()
        lines = self._next_lines()
        if not lines:
            return False
        entries = [_parse(line) for line in lines]
        try:
            count = self._server.deliver(entries, self._state["known"], self._history)
        except Refused as error:
            self._set_aside(entries[0], str(error))
            # The next ones are often refused too: read few, and then more again.
            count, self._num_bytes = 1, 0
        else:
            self._num_bytes = min(2 * self._num_bytes + 4096, self.MAX_BYTES)
        self._state["offset"] += sum(map(len, lines[:count]))
        self._save_state()
        return True

    def _set_aside(self, entry: Entry, reason: str) -> None:
        """Write an entry to the file of refused ones, once: a killed process may have written it before."""
        record = {"offset": self._state["offset"], "reason": reason, "entry": entry}
        if self._last_refused != record["offset"]:
            with open(self.refused_path, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
            self._last_refused = record["offset"]
        self._server.on_refused(entry, reason)

    def _save_state(self) -> None:
        self._is_saved = False
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut can leave a cursor beyond the end of the journal
        storage.write_json_atomically(str(self._state_path), self._state)
        self._is_saved = True

    def _history(self) -> list[Entry]:
        """Return the entries before the cursor."""
        with open(self.path, "rb") as file:
            return _read_lines(file.read(self._state["offset"]))

    def _next_lines(self) -> list[bytes]:
        """Return some complete lines from the cursor on."""
        with open(self.path, "rb") as file:
            file.seek(self._state["offset"])
            lines = (file.read(self._num_bytes) + file.readline()).splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n")]


def _why_unavailable(error: OSError) -> str:
    """Return why nothing can be delivered at present, as the end of a sentence about the server."""
    if isinstance(error, ConnectionError):
        return str(error)
    return f"gets nothing, because its journal cannot be read or written ({error})"


def merge_journals(source: Path, target: Path, uri: str, change: Callable[[bytes], bytes]) -> None:
    """Move a closed journal to another name, before what a journal of that name has, and remove it.

    uri: address of the server under that name. change: is applied to every line.
    """
    delivered, waiting, refused = b"", b"", b""
    known: Ids = {}
    for path in (source, target):
        for file in (path, refused_path(path)):
            _truncate_torn_line(file)
        lines = path.read_bytes() if path.exists() else b""
        state = _read_state(path)
        apply = change if path == source else bytes
        delivered += b"".join(map(apply, lines[: state["offset"]].splitlines(keepends=True)))
        waiting += b"".join(map(apply, lines[state["offset"] :].splitlines(keepends=True)))
        if refused_path(path).exists():
            refused += b"".join(map(apply, refused_path(path).read_bytes().splitlines(keepends=True)))
        known |= state["known"]
    storage.write_atomically(str(target), delivered + waiting)
    storage.write_json_atomically(str(_state_path(target)), {"offset": len(delivered), "known": known, "uri": uri})
    if refused:
        storage.write_atomically(str(refused_path(target)), refused)
    for path in (source, _state_path(source), refused_path(source)):
        path.unlink(missing_ok=True)


def read_uri(path: Path) -> str | None:
    """Return the address of the server that a journal is for; None if it was not recorded."""
    return _read_state(path).get("uri")


def has_open_runs(path: Path) -> bool:
    """Return whether a run was started in a journal, and not ended since."""
    is_open: dict[str, bool] = {}
    with open(path, "rb") as lines:
        for line in lines:
            if line.startswith((b'{"op": "run"', b'{"op": "end"')) and line.endswith(b"\n"):
                entry = _parse(line)
                is_open[entry["run"]] = entry["op"] == "run"
    return any(is_open.values())


def count_undelivered(path: Path) -> int:
    """Return how many entries of a journal still wait for delivery."""
    return path.read_bytes().count(b"\n", _read_state(path)["offset"])


def files_of(path: Path) -> list[str]:
    """Return the files of a journal: itself, its cursor, and the entries that were set aside."""
    return [str(path), str(_state_path(path)), str(refused_path(path))]


def _state_path(path: Path) -> Path:
    return path.with_suffix(".state.json")


def _read_state(path: Path) -> dict[str, Any]:
    """Return the cursor of a journal, and the ids and the address that it has noted. Raises InvalidInput.

    A cursor beyond the end of a journal, whose last entries a power cut has taken, is moved to the end.
    """
    file = _state_path(path)
    if not file.exists():
        return {"offset": 0, "known": {}}
    state = storage.read_json(str(file))
    size = path.stat().st_size if path.exists() else 0
    try:
        is_valid = operator.index(state["offset"]) >= 0 and isinstance(state["known"], dict)
    except (TypeError, KeyError):
        is_valid = False
    if not is_valid:
        raise InvalidInput(
            f"{file}: found {str(state)[:200]}",
            f"a cursor within the journal of {size:,} bytes, and the store's ids of its runs",
            "remove it; the journal is then delivered again from its start",
        )
    return {**state, "offset": min(state["offset"], size)}


def refused_path(path: Path) -> Path:
    """Return the file of the entries of a journal that were set aside."""
    return path.with_suffix(".refused.jsonl")


def _read_lines(content: bytes) -> list[Entry]:
    return [_parse(line) for line in content.splitlines()]


def _read_refused(path: Path) -> list[dict[str, Any]]:
    """Return what was set aside: entries with their offset in the journal and the reason."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        record = _load(line)
        is_record = {"offset", "reason", "entry"} <= record.keys()
        records.append(record if is_record else {"offset": -1, "reason": "", "entry": _parse(line)})
    return records


def _last_refused(path: Path) -> int | None:
    """Return the offset of the entry that was set aside last; None if there is none."""
    records = _read_refused(path)
    return records[-1]["offset"] if records else None


def _parse(line: bytes) -> Entry:
    """Return the entry in a line. One that holds none is an entry of no kind, which no server takes."""
    entry = _load(line)
    is_entry = all(isinstance(entry.get(name), str) for name in ("op", "run"))
    return entry if is_entry else {"op": "", "run": "", "line": line.decode(errors="replace")}


def _load(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line; an empty one if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _truncate_torn_line(path: Path) -> None:
    """Remove the half line that a process leaves when it is killed while appending."""
    if path.exists():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)
