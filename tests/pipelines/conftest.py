"""The command line called here, and one Ray for all tests that run stages in this process."""

import sys

import pytest
from buckets import access

from pipelines import cli


@pytest.fixture
def raydit(monkeypatch, capsys):
    """Call the command here: exit code, stdout, stderr. Starting Python for each would take seconds."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["raydit", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """One for all tests, which leave it as it is but for further runs: its database takes seconds to make."""
    from tiny_story import tell_story

    return tell_story(tmp_path_factory.mktemp("story"))


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
