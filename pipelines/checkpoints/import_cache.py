"""Weights of other projects, imported into this user's cache: they are converted once, and not for each command."""

import hashlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from cluster import storage
from dit.autoencoder import VAE, describe_autoencoder, find_autoencoder, is_same_autoencoder
from dit.checkpoint import OFFICIAL_AUTOENCODER, Checkpoint, load_checkpoint
from dit.formats.autoencoder_digests import config_sha256
from dit.formats.record import AutoencoderRecord
from pipelines.checkpoints.importing import import_checkpoint, import_settings, is_pipeline
from raydit.errors import InvalidInput, NotFound


def import_once(path: Path, model: str | None, overrides: tuple[str, ...]) -> Checkpoint:
    """Import another project's weights into the cache, unless the same files were imported in the same way before.

    model, overrides: as for `open_checkpoint`; a folder among them is absolute. An autoencoder that has been replaced
    is another way. Raises the same errors as `import_checkpoint`, and InvalidInput where nothing says what a file of
    weights is of.
    """
    settings = import_settings(overrides, pipeline=is_pipeline(path))
    if not is_pipeline(path) and model is None and "overrides" not in settings:
        raise InvalidInput(
            f"{path} is {'a file' if path.is_file() else 'the shards of a file'}",
            "a checkpoint folder, or the size that these official weights have",
            "add --model, such as --model DiT-XL/2; for a size that has no name: "
            f"raydit import {shlex.quote(str(path))} OUT",
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = (stamps, model, sorted(settings.items()))
    decoder = _find_decoder(path, settings.get("autoencoder"))
    first, own = _folder_for(path, key), _folder_for(path, (*key, decoder and decoder[1:]))
    first.parent.mkdir(parents=True, exist_ok=True)
    with storage.lock(str(first.parent)):  # several workers of a machine may open it at the same time
        for folder in (first, own):
            known = folder.is_dir()
            opened = load_checkpoint(folder) if known else import_checkpoint(path, folder, model=model, **settings)
            if not known or decoder is None or decoder.is_recorded_by(opened):
                break
        return opened


def _folder_for(path: Path, key: tuple[Any, ...]) -> Path:
    """Return the folder in the cache for an import. key: all that it depends on."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return Path(storage.cache_folder("imported")) / digest / path.stem


class _Decoder(NamedTuple):
    """The autoencoder on this machine that samples of imported weights would be decoded by."""

    folder: Path
    sha256: str
    config_sha256: str
    scale: dict[str, Any] | None
    """The scale that its config gives; None for a pipeline's own, whose config is one of the files imported."""

    def is_recorded_by(self, opened: Checkpoint) -> bool:
        """Return whether an import would record it today: the same weights and scale, or none that were not here."""
        recorded = opened.record.autoencoder
        if recorded.sha256 is None:
            return True
        is_same_scale = self.scale is None or self.scale == recorded.scale.to_json()
        return is_same_scale and is_same_autoencoder(self.folder, vars(recorded))


def _find_decoder(path: Path, id: str | None) -> _Decoder | None:
    """Return the autoencoder that an import would record; None if it is not on this machine.

    id: that is given; None for the pipeline's own, or for the one that official weights have by default.
    """
    is_own = id is None and is_pipeline(path)
    folder = path / VAE if is_own else find_autoencoder(id or OFFICIAL_AUTOENCODER)
    if folder is None or not folder.is_dir():
        return None
    try:
        described = describe_autoencoder(folder)
    except NotFound:  # the import says what is missing, and an earlier one can be opened for its weights
        return None
    scale = AutoencoderRecord.from_dict({"id": str(folder), **described}).scale.to_json()
    return _Decoder(folder, described["sha256"], config_sha256(folder), None if is_own else scale)
