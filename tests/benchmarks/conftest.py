"""What all benchmarks share: a place for what they find, and whether a rough answer will do."""

import pytest
from results import FOLDER, Results


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a few rounds of small cases; the results are not kept")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    """Whether a rough answer will do."""
    return request.config.getoption("--quick", default=False)


@pytest.fixture(scope="session")
def results(quick, tmp_path_factory):
    """To add figures to."""
    return Results(tmp_path_factory.mktemp("results") if quick else FOLDER)
