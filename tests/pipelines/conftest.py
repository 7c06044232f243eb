"""The command line called here, and a story that it can be asked about."""

import shutil
import sys

import pytest

from pipelines.cli import main as cli


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
def empty_database(tmp_path_factory):
    """A database without runs, to be copied: a fresh one costs seconds."""
    from pipelines.tracking.store import check_tracking

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    check_tracking(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database):
    """One database for a module."""
    return f"sqlite:///{shutil.copy(empty_database, tmp_path_factory.mktemp('store'))}"


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """One for all tests, which leave it as it is but for further runs: its database takes seconds to make."""
    from tiny_story import tell_story

    return tell_story(tmp_path_factory.mktemp("story"))
