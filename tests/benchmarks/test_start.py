"""Start-up time of commands, compared with the start of the interpreter and with the imports that they need."""

import re
import shutil
import subprocess
import sys
import time

import pytest
from harness import alternate, clocked, in_turn

pytestmark = pytest.mark.benchmark
RECIPE = "pipelines/recipes/digits.toml"
COMMANDS = {
    "raydit --help": ["--help"],
    "raydit run --dry-run": ["run", RECIPE, "--dry-run"],
}
"""--dry-run reads and validates a recipe."""
FIRST_STEP = re.compile(r"^train +1/")
IMPORTS = "import torch, mlflow, ray.train.torch"
"""Imports of the command's own process; its workers import most of it again."""


def run(*arguments):
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_start(results, quick, name):
    ours = run("-m", "pipelines.cli", *COMMANDS[name])
    timings = alternate({"ours": ours, "python": run("-c", "pass")}, rounds=3 if quick else 10)
    measured = f"{timings['ours'].median:.2f} s, {timings['python'].median:.2f} s of it Python's own start"
    results.add("start", name, measured)


def test_trainings_start(results, quick, tmp_path):
    """Time from the command to the first step with two workers, and the time that one process needs for its imports."""
    output = tmp_path / "output"
    flags = [f"output={output}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    flags += ["autoencoder.train.steps=40", "train.steps=60", "train.log_every=1"]
    flags += ["train.num_workers=2", "train.cpus_per_worker=1"]
    flags += [f"train.{name}=60" for name in ("checkpoint_every", "validate_every", "sample_every")]
    command = [RECIPE, *(part for flag in flags for part in ("--set", flag))]
    for stage in ("autoencoder", "encode"):
        run("-m", "pipelines.cli", stage, *command)()

    def first_step():
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        started = time.perf_counter()
        arguments = [sys.executable, "-m", "pipelines.cli", "train", *command]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None, "it was asked for"
            seconds = next(time.perf_counter() - started for line in process.stdout if FIRST_STEP.match(line))
            process.communicate()
        return seconds

    candidates = {"train": first_step, "imports": clocked(run("-c", IMPORTS))}
    timings = in_turn(candidates, rounds=1 if quick else 3)
    train, imports = timings["train"].median, timings["imports"].median
    results.add("start", "raydit train", f"first step after {train:.1f} s; one process's imports take {imports:.1f} s")
