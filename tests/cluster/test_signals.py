"""Signals end a command tidily: once, also where Python or a library would lose them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import signals

ROOT = Path(__file__).resolve().parents[2]


def waits():
    """Wait in a system call that only a real signal ends."""
    subprocess.run(["sleep", "20"])
    pytest.fail("not interrupted")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_raises_and_names_the_exit_code(number, code):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)  # nohup, under which the tests run, lets no SIGHUP through
    before, tidied = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), signals.handle_signals():
        try:
            signal.raise_signal(number)
        finally:
            tidied.append(True)
    assert tidied and signals.exit_code() == code
    assert signal.getsignal(number) is before


def test_a_signal_that_is_delivered_twice_counts_once():
    with signals.handle_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.exit_code() == 143


def test_an_import_is_finished_before_a_signal_ends_the_process(tmp_path, monkeypatch):
    """torch's modules call Python while they are imported, and abort the process if it raises."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outer_module.py").write_text("import inner_module\nfinished = True\n")
    (tmp_path / "inner_module.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.5)\nfinished = True\n"
    )
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), signals.handle_signals():
        import outer_module

        waits()
    assert sys.modules["inner_module"].finished and outer_module.finished and signals.exit_code() == 143
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_module_that_runs_a_command_while_it_is_imported_is_interrupted_at_once(tmp_path, monkeypatch):
    """As with `python -c "import my_script"`: that import began before the command."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "script_module.py").write_text(
        "import signal\nfrom cluster import signals\nreached = []\n"
        "with signals.handle_signals():\n    signal.raise_signal(signal.SIGINT)\n    raise AssertionError\n"
    )
    with pytest.raises(KeyboardInterrupt):
        import script_module  # noqa: F401


def test_a_signal_in_a_destructor_is_raised_again():
    class Destroyed:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), signals.handle_signals():
        Destroyed()
        waits()


def test_a_deferred_signal_is_raised_at_the_end_whatever_handler_was_set():
    finished = []
    with pytest.raises(KeyboardInterrupt), signals.handle_signals(), signals.defer_signals():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
        signal.raise_signal(signal.SIGTERM)
        finished.append(True)
    assert finished


def test_a_signal_while_a_dataclass_is_made_keeps_the_exit_code(tmp_path):
    """With `python -m`, Python itself would end by SIGINT, because the exception left `exec`."""
    (tmp_path / "program.py").write_text(
        "import signal, sys; from cluster import signals\n"
        "with signals.handle_signals():\n"
        "    try: exec('import signal; signal.raise_signal(signal.SIGINT)')\n"
        "    except KeyboardInterrupt: sys.exit(signals.exit_code())\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, env=env).returncode == 130


def test_work_that_stops_by_itself_is_asked_first():
    request = signals.StopRequest()
    with pytest.raises(KeyboardInterrupt), signals.handle_signals(), signals.stop_on_signal(request):
        signal.raise_signal(signal.SIGTERM)
        assert request.requested
    assert signals.exit_code() == 143


def test_what_fails_while_it_stops_counts_as_interrupted():
    with (
        pytest.raises(KeyboardInterrupt),
        signals.handle_signals(),
        signals.stop_on_signal(signals.StopRequest()),
    ):
        signal.raise_signal(signal.SIGTERM)
        raise ConnectionError("the workers are gone")


def test_work_that_cannot_stop_in_time_is_interrupted():
    request = signals.StopRequest()
    with pytest.raises(KeyboardInterrupt), signals.handle_signals(), signals.stop_on_signal(request):
        signal.raise_signal(signal.SIGINT)
        threading.Timer(0.05, request.give_up).start()
        waits()


def test_a_lost_lease_interrupts_without_asking():
    request = signals.StopRequest()
    with pytest.raises(KeyboardInterrupt), signals.handle_signals(), signals.stop_on_signal(request):
        threading.Timer(0.05, signals.interrupt).start()
        waits()
    assert not request.requested


WAITING = """
import time
from cluster import signals
with signals.handle_signals(exit_at_once=True):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidying up", flush=True)
        time.sleep({seconds})
        print("done", flush=True)
"""


def start(seconds, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(seconds=seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_the_process_at_once():
    process = start(60)
    process.terminate()
    assert process.stdout.readline() == "tidying up\n"
    while process.poll() is None:  # within a second it counts as the first one
        process.terminate()
        time.sleep(0.2)
    output, errors = process.communicate()
    assert process.returncode == 143 and "done" not in output and "ended at once" in errors


def test_an_inherited_ignored_or_blocked_sigint_still_stops():
    """Scripts start background commands with SIGINT ignored, and Ray starts processes with it blocked."""

    def ignore_and_block():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    process = start(0, preexec_fn=ignore_and_block)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output == "tidying up\ndone\n" and "Interrupted" in errors


def test_nohup_is_respected():
    process = start(0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.terminate()
    assert process.communicate(timeout=60)[0] == "tidying up\ndone\n"


def test_work_that_ends_while_an_interruption_waits_for_an_import_is_not_ended_by_the_alarm(tmp_path):
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    code = (
        "from cluster import signals\nimport time\nwith signals.handle_signals():\n    import slow\ntime.sleep(0.5)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
