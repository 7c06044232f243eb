"""How far a stage is: on a terminal a bar, in a job's log plain lines."""

import io

import pytest

from pipelines.console import Progress, counted, say
from pipelines.images.listing import summarize_images


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


def test_a_log_gets_a_line_every_few_seconds_with_pace_and_time_left(clock, capsys):
    progress = Progress("encode", total=4000, unit="images")
    for _ in range(12):
        advance(clock, progress, 1, 10)
    assert capsys.readouterr().out.splitlines() == [
        "encode           0/4,000 images | starting",
        "encode          50/4,000 images | 10.0 images/s | 6:35 left",
        "encode         100/4,000 images | 10.0 images/s | 6:30 left",
    ]
    advance(clock, progress, 1, 3880)
    assert capsys.readouterr().out == "encode       4,000/4,000 images | 332.5 images/s\n"


def test_the_start_does_not_count_as_slowness(clock, capsys):
    """20 seconds of start, then 50 steps a second: 21 seconds are left, not 18 minutes."""
    progress = Progress("train", total=1100, unit="steps")
    advance(clock, progress, 20, 20)
    advance(clock, progress, 5, 30)
    advance(clock, progress, 5, 250)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "train           20/1,100 steps",
        "train           50/1,100 steps | 6.0 steps/s | 2:55 left",
        "train          300/1,100 steps | 28.0 steps/s | 0:28 left",
    ]


def test_the_time_left_follows_the_recent_pace(clock, capsys):
    progress = Progress("train", total=10_000, unit="steps")
    for count in [1000, *[100] * 60]:
        advance(clock, progress, 1, count)
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 100.0 steps/s | 0:31 left")


def test_what_was_done_before_counts_as_done_and_not_as_fast(clock, capsys):
    progress = Progress("encode", total=100, unit="images", start=90)
    advance(clock, progress, 5, 2)
    advance(clock, progress, 5, 5)
    assert capsys.readouterr().out.splitlines() == [
        "encode        90/100 images | starting",
        "encode        92/100 images",
        "encode        97/100 images | 1.0 images/s | 0:03 left",
    ]


def test_hours_are_told_as_hours(clock, capsys):
    progress = Progress("encode", total=100_100, unit="images")
    for _ in range(2):
        advance(clock, progress, 10, 100)
    assert capsys.readouterr().out.endswith("| 10.0 images/s | 2:46:30 left\n")


def test_a_terminal_gets_a_bar_that_is_drawn_over(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress("encode", total=40, unit="images")
    for _ in range(2):
        advance(clock, progress, 1, 10)
    progress.done("40 latents")
    start, first, second, last = (drawn for drawn in terminal.getvalue().split("\r") if drawn and drawn != "\x1b[K")
    assert start.startswith("encode       [                    ]  0/40 images | starting")
    assert first.startswith("encode       [#####               ] 10/40 images\x1b")
    assert second.startswith("encode       [##########          ] 20/40 images | 10.0 images/s | 0:02 left")
    assert last.endswith("40 latents (2 s)\n")


def test_a_notice_replaces_an_open_bar_on_a_terminal(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress("train", total=40, unit="steps")
    advance(clock, progress, 1, 10)
    say("train", "step 10: validation loss 0.5")
    *_, bar, notice = terminal.getvalue().split("\r")
    assert bar.startswith("train        [#####               ] 10/40 steps")
    assert notice == "\x1b[Ktrain        step 10: validation loss 0.5\n"


def test_one_thing_is_counted_in_the_singular():
    assert [counted(n, "image") for n in (0, 1, 2, 1797)] == ["0 images", "1 image", "2 images", "1,797 images"]
    assert summarize_images(1, 0) == "1 image without classes" and summarize_images(2, 1) == "2 images in 1 class"
