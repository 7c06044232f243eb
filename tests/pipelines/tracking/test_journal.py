"""The journal: nothing is lost, doubled or reordered, whatever the server and the process do."""

import json
import os
import threading
import time
from types import SimpleNamespace

import pytest

from cluster import storage
from pipelines.tracking import journal as journal_module
from pipelines.tracking import undelivered
from pipelines.tracking.delivery import Delivery
from pipelines.tracking.journal import Journal, Refused
from pipelines.tracking.journal_folder import journal_path


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch):
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (0,))


class Server:
    """Takes entries while it is up, up to `takes` of them at a time but `never` these, and notes each in `known`."""

    def __init__(self, *, up=True, takes=3, never=()):
        self.up, self.takes, self.never = up, takes, never
        self.received, self.outages, self.set_aside, self.known_at = [], [], [], []
        self.refused = threading.Event()

    def deliver(self, entries, known, history):
        if not self.up:
            self.refused.set()
            raise ConnectionError("down")
        self.known_at.append(dict(known))
        taken = [entry for entry in entries[: self.takes] if entry["n"] not in self.never]
        if entries[0]["n"] in self.never:
            raise Refused(f"never {entries[0]['n']}")
        taken = entries[: len(taken)]
        self.received += taken
        known["last"] = taken[-1]["n"]
        return len(taken)

    def on_unavailable(self, reason):
        self.outages.append(reason)

    def on_refused(self, entry, reason):
        self.set_aside.append((entry["n"], reason))

    def go_down(self):
        self.refused.clear()
        self.up = False

    def open(self, path):
        return Journal(path, self)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "journal.jsonl"


def numbered(start, stop):
    return [entry(n) for n in range(start, stop)]


def entry(n, **more):
    return {"op": "count", "run": "r", "n": n, **more}


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
    asked, answer = threading.Event(), threading.Event()

    class Slow(Server):
        def deliver(self, *arguments):
            asked.set()
            assert answer.wait(30)
            return super().deliver(*arguments)

    server = Slow()
    journal = server.open(path)
    journal.append(entry(0))
    assert asked.wait(30)
    append_all(journal, numbered(1, 10))  # would never return if it waited
    assert server.received == [] and journal.undelivered
    answer.set()
    assert journal.close(30)
    assert server.received == numbered(0, 10)


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
        journal.append(entry(n))
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

    later = Server()
    journal = later.open(path)
    assert journal.entries() == numbered(0, 8)
    assert journal.close(30)
    assert later.received == numbered(4, 8)
    assert later.known_at[0] == {"last": 3}


def test_closing_does_not_wait_for_the_next_retry(path, monkeypatch):
    monkeypatch.setattr(Journal, "RETRY_SECONDS", (3600,))
    server = Server(up=False)
    journal = server.open(path)
    journal.append(entry(0))
    assert server.refused.wait(30)
    assert not journal.close(3600)  # one last attempt, and back


def test_a_line_torn_by_a_kill_is_cut(path):
    path.parent.mkdir()
    path.write_text("".join(json.dumps(entry(n)) + "\n" for n in (0, 1)) + '{"n": 2, "torn')
    server = Server()
    journal = server.open(path)
    append_all(journal, numbered(3, 5))
    assert journal.close(30)
    whole = [*numbered(0, 2), *numbered(3, 5)]
    assert server.received == whole == [json.loads(line) for line in path.read_text().splitlines()]


def test_an_entry_longer_than_a_read_is_delivered(path):
    server = Server()
    journal = server.open(path)
    entries = [entry(0), entry(1, text="x" * (3 << 20)), entry(2)]
    append_all(journal, entries)
    assert journal.close(30)
    assert server.received == entries


def test_what_the_server_never_takes_is_set_aside_and_sent_again_on_request(path):
    server = Server(never=(2, 3))
    journal = server.open(path)
    append_all(journal, numbered(0, 6))
    assert journal.close(30)
    assert server.received == [*numbered(0, 2), *numbered(4, 6)]
    assert server.set_aside == [(2, "never 2"), (3, "never 3")]
    kept = [json.loads(line) for line in journal.refused_path.read_text().splitlines()]
    assert [(record["entry"], record["reason"]) for record in kept] == [(entry(2), "never 2"), (entry(3), "never 3")]

    server.never = (3,)
    assert journal.retry_refused() == (1, 1) and server.received[-1] == entry(2)
    server.up, server.never = False, ()
    assert journal.retry_refused() == (0, 1)
    server.up = True
    assert journal.retry_refused() == (1, 0) and server.received[-1] == entry(3)
    assert not journal.refused_path.exists()


def test_an_entry_that_was_set_aside_before_a_kill_stands_there_once(path):
    server = Server(never=(0,))
    journal = server.open(path)
    append_all(journal, numbered(0, 1))
    assert journal.close(30)
    path.with_suffix(".state.json").unlink()  # killed before the cursor moved
    journal = server.open(path)
    assert journal.close(30)
    assert len(journal.refused_path.read_text().splitlines()) == 1


def test_the_history_is_what_was_delivered_before(path):
    histories = []

    class Reading(Server):
        def deliver(self, entries, known, history):
            histories.append(history())
            return super().deliver(entries, known, history)

    journal = Reading(takes=2).open(path)
    append_all(journal, numbered(0, 4))
    assert journal.close(30)
    assert histories[0] == [] and histories[-1] == numbered(0, len(histories[-1])) and 2 <= len(histories[-1]) < 4


def test_a_full_disk_is_waited_for_and_said_once(path, monkeypatch):
    write, failures = storage.write_json_atomically, [OSError(28, "No space left on device") for _ in range(3)]

    def fail_at_first(*arguments):
        if failures:
            raise failures.pop()
        write(*arguments)

    monkeypatch.setattr(storage, "write_json_atomically", fail_at_first)
    server = Server()
    journal = server.open(path)
    append_all(journal, numbered(0, 9))
    while journal.is_delivering or failures:
        pass
    assert journal.close(30) and server.received == numbered(0, 9)
    (said,) = server.outages
    assert said.startswith("gets nothing, because its journal cannot be read or written") and "No space left" in said
    assert storage.read_json(str(path.with_suffix(".state.json")))["offset"] == path.stat().st_size


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_delivery_that_a_bug_has_ended(path, tmp_path, monkeypatch):
    def fail(*arguments):
        raise TypeError("a bug")

    def sleep(seconds):
        assert next(naps, None) is not None, "waited in vain"
        time.sleep(seconds)

    naps = iter(range(400))
    monkeypatch.setattr(Delivery, "deliver", fail)
    monkeypatch.setattr(undelivered, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(undelivered, "refuse_unusable", lambda uri: None)
    output = str(tmp_path / "output")
    file = journal_path(output, "http://store")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(entry(0)) + "\n")
    done = undelivered.deliver_journal(output, undelivered.JournalFile(file, "", "http://store"))
    assert (done.delivered, done.waiting) == (0, 1)


def test_a_cursor_beyond_the_end_of_a_journal_is_moved_to_the_end(path):
    """A power cut has taken what the disk had not written yet."""
    server = Server()
    journal = server.open(path)
    append_all(journal, numbered(0, 5))
    assert journal.close(30)
    path.write_bytes(path.read_bytes()[:-7])
    journal = server.open(path)
    append_all(journal, numbered(5, 7))
    assert journal.close(30) and server.received == numbered(0, 7)
    assert journal.entries() == [*numbered(0, 4), *numbered(5, 7)]


def test_the_journal_is_on_disk_before_its_cursor(path, monkeypatch):
    done, sync, write = [], os.fsync, storage.write_json_atomically

    def note_sync(number):
        done.append(os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    def note_write(file, content):
        done.append("cursor")
        write(file, content)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(storage, "write_json_atomically", note_write)
    journal = Server().open(path)
    append_all(journal, numbered(0, 1))
    assert journal.close(30) and "cursor" in done
    for number, each in enumerate(done):
        assert each != "cursor" or done[number - 1] == str(path)


def test_the_work_of_setting_entries_aside_grows_with_their_number_only(path, monkeypatch):
    """Each refusal hands the server one entry next, and reads nothing that was set aside before."""
    read, sizes = journal_module._read_refused, []
    monkeypatch.setattr(journal_module, "_read_refused", lambda file: sizes.append(file) or read(file))
    server, given = Server(never=range(300)), []
    deliver = server.deliver
    server.deliver = lambda entries, *others: given.append(len(entries)) or deliver(entries, *others)
    path.parent.mkdir()
    path.write_text("".join(json.dumps(entry(n)) + "\n" for n in range(400)))
    journal = server.open(path)
    assert journal.close(30) and server.received == numbered(300, 400) and len(server.set_aside) == 300
    assert len(sizes) == 1 and given[:301] == [400, *[1] * 300] and max(given[301:]) > 3
