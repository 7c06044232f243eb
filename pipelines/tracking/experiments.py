"""The experiment of a recipe in MLflow, also after it was deleted there, and the names that MLflow allows."""

from typing import Any

from pipelines.tracking import tags
from pipelines.tracking.database import database_folder
from pipelines.tracking.experiment_page import experiment_tags
from pipelines.tracking.moved_store import ARTIFACTS
from pipelines.tracking.searches import search_experiments

MODEL_NAME_FORBIDS = "/:.%\"'"
"""Characters that MLflow refuses in the name of a LoggedModel (mlflow.utils.validation)."""
REGISTERED_NAME_FORBIDS = "/:\"'"
"""Characters that MLflow refuses in the name of a registered model, and quotes, because MLflow cannot search for names
that contain them."""


def clean_name(name: str, forbidden: str = MODEL_NAME_FORBIDS) -> str:
    """Return a name with a hyphen instead of each character that MLflow refuses."""
    return "".join("-" if letter in forbidden else letter for letter in name)


def find_experiment(client: Any, name: str) -> Any | None:
    """Return a recipe's experiment; if it was deleted, the one that replaces it. None if there is neither."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "active":
        return found
    order = ["creation_time DESC"]
    return next(iter(client.search_experiments(filter_string=tags.has(tags.EXPERIMENT, name), order_by=order)), None)


def experiment_of_checkpoint(client: Any, digest: str) -> str:
    """Return the name of an experiment with a LoggedModel of the checkpoint of a digest; empty if there is none."""
    names = {each.experiment_id: each.name for each in search_experiments(client)}
    query = tags.has(tags.CHECKPOINT_DIGEST, digest)
    found = client.search_logged_models(list(names), filter_string=query, max_results=1) if names else []
    return names[found[0].experiment_id] if found else ""


def create_experiment(client: Any, uri: str, name: str) -> tuple[str, str]:
    """Create a recipe's experiment, and return its id and its name.

    A deleted experiment keeps its name in MLflow, so the new one is named NAME (2). If the store is a database file,
    artifacts lie beside it, not in the working folder.
    """
    folder = database_folder(uri)
    location = str(folder / ARTIFACTS) if folder else None
    page, new_name, number = experiment_tags(name), name, 1
    while (taken := client.get_experiment_by_name(new_name)) is not None and taken.lifecycle_stage != "active":
        number += 1
        new_name = f"{name} ({number})"
        page[tags.EXPERIMENT] = name
    try:
        return client.create_experiment(new_name, location, page), new_name
    except Exception:
        if found := find_experiment(client, name):  # another process created it first
            return found.experiment_id, found.name
        raise
