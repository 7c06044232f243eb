"""How far a stage is: on a terminal a bar, in a job's log plain lines."""

import io

import pytest

from pipelines.console import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, in seconds."""
    now = [100.0]
    monkeypatch.setattr("pipelines.console.time.monotonic", lambda: now[0])
    return now


def advance(clock, progress, seconds, count):
    clock[0] += seconds
    progress.advance(count)


def test_a_log_gets_a_line_every_few_seconds_with_rate_and_time_left(clock, capsys):
    progress = Progress("encode", total=4000, unit="images")
    for _ in range(12):
        advance(clock, progress, 1, 10)
    assert capsys.readouterr().out.splitlines() == [
        "encode          50/4,000 images | 10.0 images/s | 6:35 left",
        "encode         100/4,000 images | 10.0 images/s | 6:30 left",
    ]
    advance(clock, progress, 1, 3880)
    assert capsys.readouterr().out == "encode       4,000/4,000 images | 307.7 images/s\n"


def test_what_was_done_before_counts_as_done_and_not_as_fast(clock, capsys):
    progress = Progress("encode", total=100, unit="images", start=90)
    advance(clock, progress, 5, 5)
    assert capsys.readouterr().out == "encode        95/100 images | 1.0 images/s | 0:05 left\n"


def test_hours_are_told_as_hours(clock, capsys):
    progress = Progress("encode", total=100_000, unit="images")
    advance(clock, progress, 10, 100)
    assert capsys.readouterr().out.endswith("| 10.0 images/s | 2:46:30 left\n")


def test_a_terminal_gets_a_bar_that_is_drawn_over(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress("encode", total=40, unit="images")
    for _ in range(2):
        advance(clock, progress, 1, 10)
    progress.done("40 latents")
    first, second, last = (drawn for drawn in terminal.getvalue().split("\r") if drawn and drawn != "\x1b[K")
    assert first.startswith("encode       [#####               ] 10/40 images | 10.0 images/s | 0:03 left")
    assert second.startswith("encode       [##########          ] 20/40 images | 10.0 images/s | 0:02 left")
    assert last.endswith("40 latents (2 s)\n")
