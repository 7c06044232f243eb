"""The journal: nothing is lost, doubled or reordered, whatever the server and the process do."""

import json
import threading

import pytest

from pipelines.tracking.journal import Journal


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch):
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (0,))


class Server:
    """Takes entries while it is up, up to `takes` of them at a time, and notes each in `known`."""

    def __init__(self, *, up=True, takes=3):
        self.up, self.takes = up, takes
        self.received, self.outages = [], []
        self.refused = threading.Event()

    def __call__(self, entries, known):
        if not self.up:
            self.refused.set()
            raise ConnectionError("down")
        taken = entries[: self.takes]
        self.received += taken
        known["last"] = taken[-1]["n"]
        return len(taken)

    def go_down(self):
        self.refused.clear()
        self.up = False

    def open(self, path):
        return Journal(path, self, self.outages.append)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "journal.jsonl"


def numbered(start, stop):
    return [{"n": n} for n in range(start, stop)]


def append_all(journal, entries):
    for entry in entries:
        journal.append(entry)


def test_entries_are_delivered_in_order_and_once(path):
    server = Server()
    journal = server.open(path)
    append_all(journal, numbered(0, 100))
    assert journal.close(30)
    assert not journal.undelivered
    assert server.received == numbered(0, 100) == journal.entries()


def test_appending_does_not_wait_for_a_delivery(path):
    asked, answer, received = threading.Event(), threading.Event(), []

    def deliver(entries, known):
        asked.set()
        assert answer.wait(30)
        received.extend(entries)
        return len(entries)

    journal = Journal(path, deliver, lambda reason: None)
    journal.append({"n": 0})
    assert asked.wait(30)
    append_all(journal, numbered(1, 10))  # would never return if it waited
    assert received == [] and journal.undelivered
    answer.set()
    assert journal.close(30)
    assert received == numbered(0, 10)


def test_what_is_appended_while_the_courier_finds_nothing_is_delivered_on_closing(path, monkeypatch):
    """The courier has read an empty journal, and gets on only when all is appended and the journal being closed."""
    found, go_on, read = threading.Event(), threading.Event(), Journal._next_lines

    def read_slowly(journal):
        lines = read(journal)
        if not found.is_set():
            found.set()
            assert go_on.wait(30)
        return lines

    monkeypatch.setattr(Journal, "_next_lines", read_slowly)
    server = Server()
    journal = server.open(path)
    assert found.wait(30)
    append_all(journal, numbered(0, 5))
    journal._closing.set()
    go_on.set()
    assert journal.close(30)
    assert server.received == numbered(0, 5)


def test_nothing_is_lost_while_the_server_is_away(path):
    server = Server(up=False)
    journal = server.open(path)
    append_all(journal, numbered(0, 5))
    assert server.refused.wait(30)
    append_all(journal, numbered(5, 10))
    assert server.received == [] and journal.undelivered
    server.up = True
    assert journal.close(30)
    assert server.received == numbered(0, 10)


def test_away_is_said_once_for_each_outage(path):
    server = Server()
    journal = server.open(path)
    for n in range(2):
        server.go_down()
        journal.append({"n": n})
        assert server.refused.wait(30)
        server.refused.clear()
        assert server.refused.wait(30)  # asked again
        server.up = True
        while journal.undelivered:
            pass
    assert journal.close(30)
    assert server.outages == ["down", "down"]


def test_what_was_not_delivered_is_delivered_when_opened_again(path):
    server = Server()
    journal = server.open(path)
    append_all(journal, numbered(0, 4))
    assert journal.close(30)
    server.go_down()
    journal = server.open(path)
    append_all(journal, numbered(4, 8))
    assert not journal.close(30)

    later, known_at_first = Server(), []

    def deliver(entries, known):
        known_at_first.append(dict(known))
        return later(entries, known)

    journal = Journal(path, deliver, later.outages.append)
    assert journal.entries() == numbered(0, 8)
    assert journal.close(30)
    assert later.received == numbered(4, 8)
    assert known_at_first[0] == {"last": 3}


def test_closing_does_not_wait_for_the_next_retry(path, monkeypatch):
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (3600,))
    server = Server(up=False)
    journal = server.open(path)
    journal.append({"n": 0})
    assert server.refused.wait(30)
    assert not journal.close(3600)  # one last attempt, and back


def test_a_line_torn_by_a_kill_is_cut(path):
    path.parent.mkdir()
    path.write_bytes(b'{"n": 0}\n{"n": 1}\n{"n": 2, "torn')
    server = Server()
    journal = server.open(path)
    append_all(journal, numbered(3, 5))
    assert journal.close(30)
    whole = [*numbered(0, 2), *numbered(3, 5)]
    assert server.received == whole == [json.loads(line) for line in path.read_text().splitlines()]


def test_an_entry_longer_than_a_read_is_delivered(path):
    server = Server()
    journal = server.open(path)
    entries = [{"n": 0}, {"n": 1, "text": "x" * (3 << 20)}, {"n": 2}]
    append_all(journal, entries)
    assert journal.close(30)
    assert server.received == entries
