"""One Ray for all tests that run stages in this process."""

import pytest
from buckets import access


@pytest.fixture(scope="session")
def local_ray(s3_server, tmp_path_factory):
    """More logical CPUs than the machine has, so that nothing starves. Its workers see the tests' S3."""
    import ray

    from cluster.session import ray_session

    session = ray_session("local", num_cpus=6)
    with pytest.MonkeyPatch.context() as monkeypatch:  # its processes inherit what is set while it starts
        for name, value in access(s3_server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("workers") / "cache"))
        session.__enter__()
    yield ray
    session.__exit__(None, None, None)
