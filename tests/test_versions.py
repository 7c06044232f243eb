"""raydit's version, also where its files run without being installed, as in a job that they were sent with."""

import importlib.metadata

import pytest

from cluster.doctor import check_packages
from cluster.job_package import pinned_requirements
from dit.config import DiTConfig
from dit.formats.record import describe_checkpoint
from pipelines.tracking.provenance import environment_tags
from raydit import __version__
from raydit.errors import NotFound
from raydit.versions import installed_version


def test_the_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("raydit") == __version__ == installed_version("raydit")


def test_versions_of_other_packages_are_those_installed():
    assert installed_version("click") == importlib.metadata.version("click")
    assert installed_version("no-such-package") is None


@pytest.fixture
def not_installed(monkeypatch):
    """raydit without its metadata; every other package keeps its own."""
    original = importlib.metadata.distribution

    def distribution(name):
        if name == "raydit":
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("raydit")


def test_without_metadata_checkpoints_runs_and_doctor_name_the_version(not_installed):
    described = describe_checkpoint(model=DiTConfig(), objective={}, autoencoder={}, class_names=(), seed=0)
    assert described["raydit_version"] == __version__
    environment_tags.cache_clear()
    assert environment_tags()["raydit.version.raydit"] == __version__
    (check,) = check_packages(["raydit"])
    assert check.ok and check.found == __version__


def test_without_metadata_its_requirements_are_not_known(not_installed):
    with pytest.raises(NotFound, match="no installed distribution raydit.*Install it here.*without --pip"):
        pinned_requirements("raydit")
