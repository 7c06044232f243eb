"""The bases of adapters in MLflow: which checkpoints are needed by adapters, and where a lost one has a copy."""

from collections.abc import Iterator

from pipelines.tracking import tags
from pipelines.tracking.database import is_absent
from pipelines.tracking.lookup import CheckpointRef, connected_client, find_checkpoint, model_id_of
from pipelines.tracking.searches import experiment_ids, search_runs
from pipelines.tracking.store import tracking_uri


def base_digests(uri: str) -> set[str]:
    """Return the digests of the checkpoints whose weights adapters change, by all trainings that are not deleted.

    uri: tracking URI as in a recipe. Raises Unreachable if MLflow does not answer.
    """
    uri = tracking_uri(uri)
    if is_absent(uri):
        return set()
    with connected_client(uri) as client:
        trainings = search_runs(client, experiment_ids(client), f"tags.`{tags.BASE_DIGEST}` LIKE '%'")
        return {run.data.tags[tags.BASE_DIGEST] for run in trainings}


def copies_of_base(uri: str, digest: str, weights_sha256: str) -> Iterator[CheckpointRef]:
    """Yield the checkpoints of registered versions that have a digest, or weights of one.

    uri: tracking URI as in a recipe. Raises Unreachable if MLflow does not answer.
    """
    store = tracking_uri(uri)
    if is_absent(store):
        return
    queries = (tags.has(tags.VERSION_DIGEST, digest), tags.has(tags.VERSION_WEIGHTS, weights_sha256))
    with connected_client(store) as client:
        versions = [version for query in queries for version in client.search_model_versions(query)]
    for model_id in dict.fromkeys(filter(None, map(model_id_of, versions))):
        yield find_checkpoint(uri, f"models:/{model_id}")
