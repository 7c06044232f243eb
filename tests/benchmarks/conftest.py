"""Fixtures of all benchmarks: the results, and --quick, which asks for a rough measurement."""

import pytest
from results import FOLDER, Results


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a few rounds of small cases; the results are not kept")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    """Whether a rough measurement is enough."""
    return request.config.getoption("--quick", default=False)


@pytest.fixture(scope="session")
def results(quick, tmp_path_factory):
    """The results to which a benchmark adds its figures."""
    return Results(tmp_path_factory.mktemp("results") if quick else FOLDER)
