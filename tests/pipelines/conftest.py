"""The command line called here, and one Ray for all tests that run stages in this process."""

import sys

import pytest

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
def local_ray():
    """More logical CPUs than the machine has, so that nothing starves."""
    import ray

    from cluster.session import ray_session

    with ray_session("local", num_cpus=6):
        yield ray
