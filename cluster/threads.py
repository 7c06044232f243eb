"""Run a background thread for the duration of a `with` block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def run_beside(name: str, function: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Run function(*arguments, ended) in a thread for the duration of the block.

    ended: a threading.Event that is set at the end of the block, which then waits for the thread. name: the thread's.
    """
    ended = threading.Event()
    thread = threading.Thread(target=function, args=(*arguments, ended), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
