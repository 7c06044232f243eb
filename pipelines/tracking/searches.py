"""Requests to MLflow that follow all pages of an answer, and that expect what was deleted in its UI."""

from typing import Any

from pipelines.tracking.store import is_gone


def find_version(client: Any, name: str, number: str) -> Any | None:
    """Return a registered version; None if it was deleted."""
    try:
        return client.get_model_version(name, number)
    except Exception as error:
        if is_gone(error):
            return None
        raise
