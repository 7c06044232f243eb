"""Results are kept when all benchmarks of a run have ended."""

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
    results = Results(tmp_path_factory.mktemp("results") if quick else FOLDER)
    yield results
    results.save()
