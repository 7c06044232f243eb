"""Suppress known messages that a library's native code writes to standard error, bypassing Python's logging."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

STDERR = 2
MAX_SECONDS_TO_DRAIN = 1.0


@contextlib.contextmanager
def hide_stderr_lines(pattern: str) -> Iterator[None]:
    """Drop the lines that match a regular expression and are written to file descriptor 2 during the block.

    All other lines pass, in order. For short blocks: what a crash of the process leaves in the pipe is lost.
    """
    sys.stderr.flush()
    read, write = os.pipe()
    original = os.dup(STDERR)
    os.dup2(write, STDERR)
    os.close(write)
    thread = threading.Thread(target=_forward, args=(read, original, re.compile(pattern)), name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, STDERR)  # closes the last end that is written to, unless a child process has one too
        thread.join(MAX_SECONDS_TO_DRAIN)


def _forward(read: int, original: int, hidden: re.Pattern[str]) -> None:
    with open(read, "rb") as lines, open(original, "wb", buffering=0) as stderr:
        for line in lines:
            if not hidden.search(line.decode(errors="replace")):
                stderr.write(line)
