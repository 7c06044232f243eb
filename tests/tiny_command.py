"""`raydit run` on the tiny recipe as a process, to be interrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tiny import RECIPE, place_flags

ROOT = Path(__file__).resolve().parents[1]


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run", str(RECIPE), *place_flags(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background jobs, and so their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def is_tidy(folder: Path, output: str) -> bool:
    """Whether a command ended with one line, without a stack, and without its lease."""
    noise = ("Traceback", "*** SIG", "Fatal Python error", "Exception ignored")
    said = output.splitlines()[-1].startswith("raydit: ") and output.count("run the same command again to resume") == 1
    return said and not any(text in output for text in noise) and not (folder / "output" / ".lease.json").exists()
