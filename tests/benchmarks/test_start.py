"""How long commands take before they do anything, against the interpreter's own start."""

import subprocess
import sys

import pytest
from harness import alternate

pytestmark = pytest.mark.benchmark
COMMANDS = {
    "raydit --help": ["--help"],
    "raydit run --dry-run": ["run", "pipelines/recipes/digits.toml", "--dry-run"],
}
"""With --dry-run a recipe is read and checked."""


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_start(results, quick, name):
    def start(*arguments):
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    ours = start("-m", "pipelines.cli", *COMMANDS[name])
    timings = alternate({"ours": ours, "python": start("-c", "pass")}, rounds=3 if quick else 10)
    said = f"{timings['ours'].median:.2f} s, {timings['python'].median:.2f} s of it Python's own start"
    results.add("start", name, said)
