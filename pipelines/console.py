"""Progress: a bar on a terminal, plain lines elsewhere."""

import sys
import time

EVERY_SECONDS = 5.0


def say(stage: str, text: str) -> None:
    """One line about a stage."""
    print(f"{stage:<12} {text}", flush=True)


class Progress:
    """How far a stage is: on a terminal a line that is drawn over, elsewhere a line every few seconds."""

    def __init__(self, stage: str, *, total: int, unit: str, start: int = 0):
        self.stage, self.total, self.unit = stage, total, unit
        self.count = self.first = start
        self.started = self._spoken = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.details = ""

    @property
    def rate(self) -> float:
        """Units per second since this process began."""
        return (self.count - self.first) / max(1e-9, time.monotonic() - self.started)

    def advance(self, count: int = 1, **details: float) -> None:
        """Count further; details are shown behind the count."""
        self.to(self.count + count, **details)

    def to(self, count: int, **details: float) -> None:
        """Set the count."""
        self.count = count
        if details:
            self.details = "".join(f" | {name} {value:.4g}" for name, value in details.items())
        now = time.monotonic()
        if now - self._spoken >= (0.1 if self.terminal else EVERY_SECONDS) or count >= self.total:
            self._spoken = now
            self._show()

    def _show(self) -> None:
        width = len(f"{self.total:,}")
        left = (self.total - self.count) / self.rate if self.rate else 0.0
        line = f"{self.count:>{width},}/{self.total:,} {self.unit}{self.details} | {self.rate:.1f} {self.unit}/s"
        line += f" | {_clock(left)} left" if self.count < self.total else ""
        if self.terminal:
            bar = "#" * int(20 * self.count / max(1, self.total))
            print(f"\r{self.stage:<12} [{bar:<20}] {line}\x1b[K", end="", flush=True)
        else:
            say(self.stage, line)

    def done(self, text: str) -> None:
        """End with a line that stays."""
        if self.terminal:
            print("\r\x1b[K", end="")
        say(self.stage, f"{text} ({time.monotonic() - self.started:.0f} s)")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line about something else."""
    return (str(error).splitlines() or [type(error).__name__])[0]
