"""What stages print: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque

from raydit.printable import one_line

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_BARS = 0.1
CLEAR_LINE = "\r\x1b[K"
RECENT_SECONDS = 30.0
"""The time over which the speed is measured from which the time that is left is estimated."""


def say(stage: str, text: str) -> None:
    """Print one line about a stage, instead of an open progress bar; control characters in it are escaped."""
    clear = CLEAR_LINE if sys.stdout.isatty() else ""
    print(f"{clear}{stage:<12} {one_line(text)}", flush=True)


def counted(count: int, noun: str) -> str:
    """Return a number of things in words, such as "1 image" or "1,797 images". noun: a singular that takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class Progress:
    """The progress of a stage: one line that is redrawn on a terminal, elsewhere a new line every few seconds.

    total: units in all. unit: their plural, such as "images". start: units that an earlier process has done, which
    count towards the total but not towards the speed.
    """

    def __init__(self, stage: str, *, total: int, unit: str, start: int = 0):
        self.stage, self.total, self.unit = stage, total, unit
        self.count = self.first = start
        self.started = self._printed = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.details = ""
        self._recent: deque[tuple[float, int]] = deque()
        self._print()

    @property
    def rate(self) -> float:
        """Units per second since this process began, its start included."""
        return (self.count - self.first) / max(1e-9, time.monotonic() - self.started)

    @property
    def pace(self) -> float | None:
        """Units per second of late; None in the first second after the first update, which ends the start."""
        if not self._recent:
            return None
        (began, first), (now, count) = self._recent[0], self._recent[-1]
        return (count - first) / (now - began) if now - began >= 1 else None

    def advance(self, count: int = 1, **details: float) -> None:
        """Add to the count. details: numbers to show behind it, by name."""
        self.to(self.count + count, **details)

    def to(self, count: int, **details: float) -> None:
        """Set the count. details: numbers to show behind it, by name; without any, the last ones stay."""
        self.count = count
        if details:
            self.details = "".join(f" | {name} {value:.4g}" for name, value in details.items())
        now = time.monotonic()
        self._recent.append((now, count))
        while len(self._recent) > 2 and self._recent[1][0] <= now - RECENT_SECONDS:
            self._recent.popleft()
        pause = SECONDS_BETWEEN_BARS if self.terminal else SECONDS_BETWEEN_LINES
        if now - self._printed >= pause or count >= self.total:
            self._printed = now
            self._print()

    def _print(self) -> None:
        width = len(f"{self.total:,}")
        line = f"{self.count:>{width},}/{self.total:,} {self.unit}{self.details}{self._speed()}"
        if self.terminal:
            bar = "#" * int(20 * self.count / max(1, self.total))
            print(f"\r{self.stage:<12} [{bar:<20}] {line}\x1b[K", end="", flush=True)
        else:
            say(self.stage, line)

    def _speed(self) -> str:
        """Return the pace and the time that is left at it, as far as they are known."""
        if not self._recent:
            return " | starting"
        if not self.pace:
            return ""
        left = f" | {_format_time((self.total - self.count) / self.pace)} left" if self.count < self.total else ""
        return f" | {self.pace:.1f} {self.unit}/s{left}"

    def done(self, text: str) -> None:
        """End with a line that stays: a text, and the seconds since this process began."""
        say(self.stage, f"{text} ({time.monotonic() - self.started:.0f} s)")


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
