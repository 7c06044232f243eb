"""Signals at random moments of a run: it ends tidily, or is done, and never crashes."""

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from tiny_command import is_tidy, start

REPEATS = int(os.environ.get("RAYDIT_SIGNAL_REPEATS", "5"))
"""More of them find what is rare: a crash at one of twenty signals was seen that way."""
SEED = int(os.environ.get("RAYDIT_SIGNAL_SEED", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_ends_a_run_tidily(tmp_path: Path, number: signal.Signals) -> None:
    moments, folder, finished = random.Random(1000 * SEED + number), tmp_path / "0", 0
    for _ in range(REPEATS):
        folder.mkdir(exist_ok=True)
        process = start(folder)
        try:
            output, _ = process.communicate(timeout=moments.uniform(0.5, 20))
            assert process.returncode == 0, output
            finished += 1
            folder = tmp_path / str(finished)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            output, _ = process.communicate(timeout=120)
            assert process.returncode in (128 + number, 0), output
            assert process.returncode == 0 or is_tidy(folder, output), output
