"""End a command tidily on SIGINT (Ctrl-C), SIGTERM and SIGHUP.

While `handle_signals` is active, the first signal raises KeyboardInterrupt in the main thread, so that every `with` and
`finally` on the way out does its work; a second signal ends the process at once. Three kinds of work are not
interrupted in the middle: imports are finished first, `defer_signals` holds a signal back for some seconds, and
`stop_on_signal` asks the work to end by itself.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time of the first one count as the same: `timeout` and some shells deliver one twice."""
RETRY_SECONDS = 0.2
IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""File name of the code by which Python imports modules."""


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to end.

    It has a class of its own because of `python -m`: where a plain KeyboardInterrupt has left `exec` of a string, which
    dataclasses use, the process ends by SIGINT instead of with its exit code, even if the exception was caught later.
    """


class StopRequest:
    """Whether a signal has asked some work to end by itself, before KeyboardInterrupt ends it."""

    def __init__(self) -> None:
        self.requested = False

    def give_up(self) -> None:
        """Raise KeyboardInterrupt in the main thread, because the work cannot end by itself, or not in time."""
        if _state.stop is self:
            _interrupt_main_thread()


class _State:
    """State that is shared with the handlers, which run in the main thread, between any two of its instructions."""

    active = False
    exit_at_once = False
    received: int | None = None
    """The first signal."""
    received_at = 0.0
    deferred = 0
    """Number of open `defer_signals` blocks."""
    stop: StopRequest | None = None
    frame: FrameType | None = None
    """The frame that has entered the outermost `handle_signals`."""
    alarm_handler: Any = None
    """The earlier handler of SIGALRM, while this module waits for the end of an import."""
    unraisable_hook: Callable[[Any], Any] = sys.__unraisablehook__
    """The earlier sys.unraisablehook, which is called for every other ignored exception."""
    raise_again = False
    """Whether the next signal is this module's own, which raises KeyboardInterrupt for the first one."""


_state = _State()


@contextmanager
def handle_signals(*, exit_at_once: bool = False) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP for the duration of the block, as the module describes.

    exit_at_once: whether a second signal ends the process, instead of raising KeyboardInterrupt again, as is better in
    a notebook. Has no effect inside another such block, and outside of the main thread, where Python handles no
    signals. SIGINT and SIGTERM are handled even if the process was started with them ignored, as scripts start
    background commands, because they are how a job is stopped; an ignored SIGHUP (`nohup`) stays ignored.
    """
    if _state.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.active, _state.exit_at_once = True, exit_at_once
    _state.received, _state.raise_again = None, False
    _state.frame = sys._getframe(2)  # behind contextlib's
    handled = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, _on_signal) for number in handled}
    # Ray blocks SIGINT in the processes that it starts, and a process inherits that from its parent.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _state.unraisable_hook, sys.unraisablehook = sys.unraisablehook, _on_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = _state.unraisable_hook
        if _state.alarm_handler is not None:  # the work has ended by itself; SIGALRM would end the process as it exits
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, _state.alarm_handler)
            _state.alarm_handler = None
        for number, handler in earlier.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _state.active, _state.frame = False, None


def exit_code() -> int:
    """Return the exit code of a command that a signal ended: 128 and the number of the signal."""
    return 128 + (_state.received or signal.SIGINT)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold the first signal back until the end of the block, and then raise KeyboardInterrupt for it.

    For calls that leave processes and threads behind when they are interrupted midway, such as `ray.init`. The block
    cannot replace the handlers either: Ray's own SIGTERM handler would exit without leaving the `with` blocks.
    """
    if not _state.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, set_handler = _state.received, signal.signal
    signal.signal = _keep_handlers(set_handler)
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
        signal.signal = set_handler
        _reinstall_handlers()
    if before is None and _state.received is not None and not _state.deferred:
        raise Interrupted


@contextmanager
def stop_on_signal(request: StopRequest) -> Iterator[None]:
    """Let the first signal request a stop instead of raising, and raise KeyboardInterrupt at the end of the block.

    The block must end soon after the request, or call its `give_up`. What it raises after a request is replaced by
    KeyboardInterrupt, because work that is being stopped may well fail.
    """
    _state.stop, outer = request, _state.stop
    try:
        yield
    except Exception as error:
        if request.requested:
            raise Interrupted from error
        raise
    finally:
        _state.stop = outer
    if request.requested:
        raise Interrupted


def interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, from another thread, as SIGINT does; work gets no time to end."""
    if _state.active:
        _state.received = _state.received or signal.SIGINT
        _interrupt_main_thread()
    else:
        _thread.interrupt_main()


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Handle a signal. It takes no lock and prints nothing, because the main thread may be doing either."""
    now = time.monotonic()
    if _state.raise_again:
        _state.raise_again = False
        _raise(frame)
        return
    if _state.received is None:
        _state.received, _state.received_at = number, now
        if _state.deferred:
            return
        if _state.stop is not None:
            _state.stop.requested = True
            return
        _raise(frame)
        return
    if now - _state.received_at < SAME_SIGNAL_SECONDS:
        return
    if _state.exit_at_once:
        os.write(2, b"\nraydit: ended at once; run the same command again to resume\n")
        os._exit(128 + _state.received)
    _raise(frame)


def _raise(frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; while modules are imported, when that is done.

    The modules of torch and others that are written in C++ call Python while they are imported, and abort the process
    if that raises an exception.
    """
    if not _is_importing(frame):
        raise Interrupted
    if _state.alarm_handler is None:
        _state.alarm_handler = signal.signal(signal.SIGALRM, _on_alarm) or signal.SIG_DFL
    signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import that has begun inside of `handle_signals` is not finished."""
    while frame is not None and frame is not _state.frame:
        if frame.f_code.co_filename == IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _on_alarm(number: int, frame: FrameType | None) -> None:
    if not _is_importing(frame):
        signal.signal(signal.SIGALRM, _state.alarm_handler)
        _state.alarm_handler = None
    _raise(frame)


def _on_unraisable(unraisable: Any) -> None:
    """Raise KeyboardInterrupt again where Python ignored it, because it was raised in a destructor or a callback."""
    if unraisable.exc_type is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(RETRY_SECONDS, _interrupt_main_thread).start()
    else:
        _state.unraisable_hook(unraisable)


def _interrupt_main_thread() -> None:
    _state.raise_again = True
    # A real signal, because `_thread.interrupt_main` does not end a system call in which the main thread waits.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]


def _keep_handlers(set_handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of signal.signal that leaves our handlers in place."""

    def keep(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else set_handler(number, handler)

    return keep


def _reinstall_handlers() -> None:
    """Install our handlers again where C++ code has replaced them, of which Python knows nothing."""
    for number in SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, _on_signal)
