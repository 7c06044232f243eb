"""What an output keeps in superseded/, and which of it may be removed: nothing that a registered model needs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import storage
from pipelines.artifacts import SUPERSEDED
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.autoencoder import AUTOENCODER_RECORD, is_autoencoder_of
from pipelines.tracking.bases import base_digests
from pipelines.tracking.database import is_absent
from pipelines.tracking.lookup import refuse_absent, registered_digests
from pipelines.tracking.store import tracking_uri
from pipelines.tracking.undelivered import find_journals
from raydit.errors import NotFound


@dataclass(frozen=True)
class SupersededFolder:
    """A folder in superseded/."""

    path: str
    """Path or URI."""
    num_bytes: int
    kept_for: str
    """Why it must stay; empty if it may be removed."""


def inspect_superseded(output: str, store: str = "") -> list[SupersededFolder]:
    """List what an output keeps in superseded/, by name.

    A folder stays if it holds a checkpoint of a registered model, the base of an adapter, or the autoencoder of such a
    checkpoint or of one in output/checkpoints. store: MLflow's URI, besides those that the output's journals and the
    checkpoints' recipes name. Raises NotFound if there is no such folder; Unreachable if one of the stores does not
    answer, and NotFound if one of them does not exist: then it is unknown what must stay.
    """
    if storage.is_file(output) or not storage.exists(output):
        raise NotFound(f"found no folder at {output}", "the `output` of a recipe, a folder or URI", "correct the path")
    folder = storage.join(storage.absolute(output), SUPERSEDED)
    names = sorted(name.rstrip("/") for name in storage.list_names(folder)) if storage.exists(folder) else []
    paths = [storage.join(folder, name) for name in names]
    current = list(_configs(storage.join(storage.absolute(output), "checkpoints")))
    checkpoints = {path: list(_configs(path)) for path in paths}
    everything = [config for _, config in (*current, *(each for configs in checkpoints.values() for each in configs))]
    uris = _find_stores(output, store, everything) if any(checkpoints.values()) else []
    registered = set().union(*map(registered_digests, uris))
    bases = set().union(*map(base_digests, uris))
    reasons, needed = {}, [config for _, config in current]
    for path, configs in checkpoints.items():
        if kept := [config for digest, config in configs if digest in registered]:
            reasons[path] = f"a registered model is its step {', '.join(str(config['step']) for config in kept)}"
            needed += kept
        elif kept := [config for digest, config in configs if digest in bases]:
            reasons[path] = f"adapters change its step {', '.join(str(config['step']) for config in kept)}"
            needed += kept
    for path in paths:
        if storage.exists(storage.join(path, AUTOENCODER_RECORD)) and _is_needed(path, needed):
            reasons[path] = "a checkpoint that is kept decodes its samples by it"
    sizes = {path: sum(storage.list_files(path, recursive=True).values()) for path in paths}
    return [SupersededFolder(path, sizes[path], reasons.get(path, "")) for path in paths]


def _configs(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield digest and config of each finished checkpoint in a folder, which may hold none."""
    checkpoints = CheckpointFolder(folder)
    for step in checkpoints.all_steps():
        found = checkpoints.describe(step)
        yield found.digest, found.config


def _find_stores(output: str, store: str, configs: Iterable[dict[str, Any]]) -> list[str]:
    """Return the tracking URIs of the stores that may have registered a checkpoint of an output.

    store: a URI that the user has given, or empty. Raises NotFound if a store does not exist or is unknown. If the user
    has given one, the others may be gone: a recipe names a database forever by the path that it had.
    """
    default, journals = tracking_uri(), list(find_journals(output, store))
    recorded = {_recorded_uri(config) for config in configs}
    named = {tracking_uri(uri) for uri in recorded - {""}} | {journal.uri for journal in journals if journal.uri}
    if store:
        named = {uri for uri in named if not is_absent(uri)} | {tracking_uri(store)}
    elif unknown := [journal.path for journal in journals if journal.uri is None]:
        raise NotFound(
            f"{unknown[0]}: found no record of the MLflow store that it belongs to",
            "one, because the store's registered models decide what must stay",
            "name that store with --store",
        )
    elif "" in recorded and not journals:
        named.add(default)  # nothing else says where the recipe's runs went
    for uri in sorted(named):
        refuse_absent(uri)
    return sorted(named | ({default} if not is_absent(default) else set()))


def _recorded_uri(config: dict[str, Any]) -> str:
    return ((config.get("recipe") or {}).get("tracking") or {}).get("uri", "")


def _is_needed(autoencoder: str, configs: Iterable[dict[str, Any]]) -> bool:
    folder = Path(storage.fetch_folder(autoencoder))
    records = {str(config["autoencoder"]): config["autoencoder"] for config in configs}
    return any(is_autoencoder_of(record, folder) for record in records.values() if record["sha256"])
