"""The tiny recipe, run once for all tests: as a job on a real Ray head with token authentication."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import RECIPE, place_flags, tiny_recipe

from pipelines.config import Recipe

ROOT = Path(__file__).resolve().parents[2]


class Submitter:
    """Runs `raydit submit` as a user does, in a folder of its own."""

    def __init__(self, ray_head, folder: Path):
        self.ray_head, self.folder = ray_head, folder

    def __call__(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "submit", "--address", self.ray_head.address, "--", *command],
            cwd=self.folder,
            env=os.environ | self.ray_head.env | {"PYTHONPATH": str(ROOT)} | env,
            capture_output=True,
            text=True,
            timeout=500,
        )
        print(process.stdout, process.stderr)
        return process


@pytest.fixture(scope="session")
def submit(ray_head, tmp_path_factory) -> Submitter:
    return Submitter(ray_head, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def whole_run(submit) -> subprocess.CompletedProcess:
    """The whole tiny recipe as a Ray job, its log followed to the end."""
    return submit("run", str(RECIPE), *place_flags(submit.folder))


@pytest.fixture(scope="session")
def finished(submit, whole_run) -> tuple[Path, Recipe]:
    """The folder in which the job left everything, and its recipe. Tests must leave it as it is."""
    assert whole_run.returncode == 0, whole_run.stdout + whole_run.stderr
    return submit.folder, tiny_recipe(submit.folder)


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that run stages; more logical CPUs than the machine has, so that nothing starves."""
    import ray

    from cluster.session import ray_session

    with ray_session("local", num_cpus=6):
        yield ray
