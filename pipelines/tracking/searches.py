"""Requests to MLflow that follow all pages of an answer, and that expect what was deleted in its UI."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.tracking.store import is_gone

PAGE = 1000
"""Runs or experiments that one request returns at most."""


def search_runs(client: Any, experiments: Sequence[str], query: str = "", *order: str) -> Iterator[Any]:
    """Yield all runs of some experiments that a query finds, with the data sets and models that they read or wrote.

    experiments: their ids. order: columns to sort by, such as "attributes.start_time DESC".
    """
    if experiments:
        yield from all_pages(
            lambda token: client.search_runs(
                list(experiments), query, max_results=PAGE, order_by=list(order), page_token=token
            )
        )


def search_experiments(client: Any) -> list[Any]:
    """Return all experiments that are not deleted."""
    return list(all_pages(lambda token: client.search_experiments(max_results=PAGE, page_token=token)))


def experiment_ids(client: Any) -> list[str]:
    """Return the ids of all experiments that are not deleted."""
    return [experiment.experiment_id for experiment in search_experiments(client)]


def all_pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield what all pages of an answer hold. ask: returns the page that a token names; None: the first one."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def find_version(client: Any, name: str, number: str) -> Any | None:
    """Return a registered version; None if it was deleted."""
    return _unless_gone(lambda: client.get_model_version(name, number))


def find_model(client: Any, model_id: str) -> Any | None:
    """Return a LoggedModel; None if it was deleted."""
    return _unless_gone(lambda: client.get_logged_model(model_id))


def find_run_of_id(client: Any, run_id: str) -> Any | None:
    """Return a run with what it has logged; None if there is none of this id."""
    return _unless_gone(lambda: client.get_run(run_id))


def _unless_gone(get: Callable[[], Any]) -> Any | None:
    try:
        return get()
    except Exception as error:
        if is_gone(error):
            return None
        raise
