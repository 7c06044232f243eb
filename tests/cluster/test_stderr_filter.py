"""Known lines of native code are kept off standard error, and nothing else is."""

import os

from cluster.stderr_filter import hide_stderr_lines


def test_only_matching_lines_are_dropped(capfd):
    with hide_stderr_lines(r"core_worker\.cc:\d+: Actor"):
        os.write(2, b"[E] core_worker.cc:2465: Actor with class name\nfirst\n")
        os.write(2, b"second\n")
        os.write(2, "core_worker.cc: Actor \u00e9\n".encode() + b"\xff third")
    os.write(2, b"core_worker.cc:1: Actor\n")
    found = capfd.readouterr().err
    assert found == "first\nsecond\ncore_worker.cc: Actor \u00e9\n\ufffd thirdcore_worker.cc:1: Actor\n"


def test_standard_error_is_as_before_after_an_exception(capfd):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        try:
            with hide_stderr_lines("hidden"):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            os.write(2, b"hidden no more\n")
    assert capfd.readouterr().err == "hidden no more\n" * 3
    assert len(os.listdir("/proc/self/fd")) == before
