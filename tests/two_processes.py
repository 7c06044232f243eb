"""How `make test` divides the tests between two processes: those on Ray, which share its sessions, and the others."""

import pytest

RAY = {"local_ray", "ray_head"}


def is_on_ray(item: pytest.Item) -> bool:
    return not RAY.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One group on Ray, the first, so that the first process takes it; of the others a group for each file."""
    if not config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if is_on_ray(item) else item.path.stem))
    # Those that wait for the whole run of the tiny recipe come last of those on Ray.
    items.sort(key=lambda item: (not is_on_ray(item), "whole_run" in getattr(item, "fixturenames", ())))


def has_ray(config: pytest.Config) -> bool:
    """Whether this process runs the tests on Ray."""
    return getattr(config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
