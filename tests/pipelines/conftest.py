from pathlib import Path

import pytest
from tiny import tiny_recipe

from pipelines.config import Recipe


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that run stages; more logical CPUs than the machine has, so that nothing starves."""
    import ray

    from cluster.session import ray_session

    with ray_session("local", num_cpus=6):
        yield ray


@pytest.fixture(scope="session")
def finished(local_ray, tmp_path_factory) -> tuple[Path, Recipe]:
    """A folder in which the tiny recipe has run once, and the recipe. Tests must leave it as it is."""
    from pipelines.run import run_pipeline

    folder = tmp_path_factory.mktemp("finished")
    config = tiny_recipe(folder)
    run_pipeline(config)
    return folder, config
