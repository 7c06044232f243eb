"""The tiny recipe, run once for all tests: as a job on a real Ray head with token authentication.

Its processes start one after the other and leave half of a small machine idle, so it runs from the start of the
test session, beside the tests of the mathematics.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
from ray_head import RayHead
from tiny import RECIPE, place_flags, tiny_recipe

from pipelines.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Submitter:
    """Runs `raydit submit` as a user does, in a folder of its own."""

    ray_head: RayHead
    folder: Path

    def start(self, *command: str, **options) -> subprocess.Popen:
        env = os.environ | self.ray_head.env | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
        flags = ["--address", self.ray_head.address, *options.pop("flags", ())]
        submit = [sys.executable, "-m", "pipelines.cli", "submit", *flags, "--", *command]
        return subprocess.Popen(submit, cwd=options.pop("folder", self.folder), env=env, text=True, **options)

    def __call__(
        self, *command: str, flags: tuple[str, ...] = (), folder: Path | None = None, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess:
        """flags: of `raydit submit`. folder: working directory, if not the submitter's own. env: more variables."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(*command, flags=flags, folder=folder or self.folder, env=env, **pipes)
        stdout, stderr = process.communicate(timeout=timeout)
        print(stdout, stderr)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="session")
def submit(ray_head, workers) -> Submitter:
    folder = workers.folder / "finished"
    folder.mkdir(exist_ok=True)
    return Submitter(ray_head, folder)


@pytest.fixture(scope="session")
def started_run(submit, workers) -> Iterator[None]:
    """The whole tiny recipe as a Ray job of the first worker, on its way; what it prints goes to files."""
    if not workers.is_first:
        yield
        return
    command = ("run", str(RECIPE), *place_flags(submit.folder))
    with open(submit.folder / "stdout", "w") as stdout, open(submit.folder / "stderr", "w") as stderr:
        process = submit.start(*command, stdout=stdout, stderr=stderr)
    waiting = Thread(target=lambda: workers.publish("exit_code", str(process.wait())), daemon=True)
    waiting.start()
    yield
    process.kill()
    waiting.join()


@pytest.fixture(scope="session", autouse=True)
def start_early(request) -> None:
    """Start the head and the run before the first test, if any test asks for them."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    if "ray_head" in needed:
        workers = request.getfixturevalue("workers")
        if workers.is_first:
            request.getfixturevalue("started_run" if "whole_run" in needed else "ray_head")


@pytest.fixture(scope="session")
def whole_run(submit, started_run, workers) -> subprocess.CompletedProcess:
    """The run when it has ended, and what it printed."""
    code = int(workers.wait_for("exit_code", seconds=500))
    stdout, stderr = ((submit.folder / name).read_text() for name in ("stdout", "stderr"))
    print(stdout, stderr)
    return subprocess.CompletedProcess(("run", str(RECIPE)), code, stdout, stderr)


@pytest.fixture(scope="session")
def finished(submit, whole_run) -> tuple[Path, Recipe]:
    """The folder in which the job left everything, and its recipe. Tests must leave it as it is."""
    assert whole_run.returncode == 0, whole_run.stdout + whole_run.stderr
    return submit.folder, tiny_recipe(submit.folder)
