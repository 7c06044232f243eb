"""The copy of a promoted checkpoint in the model registry, for when its training's storage no longer has it."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from cluster import storage
from dit.checkpoint import Checkpoint, load_checkpoint, verify_checkpoint
from dit.files import digest_of_files, publish
from dit.formats.digests import parse_digests
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.tracking.lookup import CheckpointRef
from pipelines.tracking.store import download_model, tracking_uri
from raydit.errors import InvalidInput

ALL_DIGESTS = "DIGESTS"
"""File of a copy with the digests of all files of the original, over which the digest of the checkpoint is taken."""
FILES = "artifacts/files"
"""Folder of a registered model that holds checkpoint/ and autoencoder/ (pipelines.registry.model_files writes it)."""


def open_registered_copy(uri: str, reference: CheckpointRef) -> Checkpoint | None:
    """Open the copy of a checkpoint that its LoggedModel holds, after downloading it to a cache; None if it has none.

    uri: tracking URI as in a recipe. The copy has the weights that sample only, and lies beside its autoencoder as in
    an output. Raises InvalidInput if it is damaged.
    """
    if not reference.model_id:
        return None
    folder = Path(storage.cache_folder("registered")) / reference.model_id
    checkpoint = folder / "checkpoints" / storage.split(reference.location)[1]
    if not checkpoint.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            files = download_model(tracking_uri(uri), reference.model_id, FILES, Path(temporary))
            if files is None:
                return None

            def write(target: Path) -> None:
                shutil.copytree(files / "checkpoint", target / "checkpoints" / checkpoint.name)
                shutil.copytree(files / "autoencoder", target / TRAINED_AUTOENCODER)

            publish(folder, write)
    opened = load_checkpoint(checkpoint)
    verify_checkpoint(opened)
    _check_is_copy(opened, reference.digest)
    # The copy lacks the files of training, over which the digest was taken.
    return replace(opened, digest=reference.digest or opened.digest)


def _check_is_copy(copy: Checkpoint, digest: str | None) -> None:
    """Raise InvalidInput if a copy is not of the checkpoint with a digest; an older copy cannot tell."""
    file = copy.path / ALL_DIGESTS
    if digest is None or not file.is_file():
        return
    original = parse_digests(file.read_bytes(), file)
    if digest_of_files(original) != digest or not copy.files.items() <= original.items():
        raise InvalidInput(
            f"{copy.path}: found another checkpoint than the one that was promoted",
            digest[:12],
            "remove that folder to download it again; if the error stays, promote the checkpoint again",
        )
