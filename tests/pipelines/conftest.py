"""One Ray for all tests that run stages in this process."""

import pytest


@pytest.fixture(scope="session")
def local_ray():
    """More logical CPUs than the machine has, so that nothing starves."""
    import ray

    from cluster.session import ray_session

    with ray_session("local", num_cpus=6):
        yield ray
