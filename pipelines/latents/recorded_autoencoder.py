"""Compare the autoencoder that latents record with the one of a recipe: its weights, its config, and its scale.

The scale is no part of the latents' identity: the moments do not depend on it, and earlier latents record none there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.latents.autoencoder import AutoencoderHandle, is_autoencoder_of
from pipelines.latents.dataset import MANIFEST, LatentDataset

MAX_DIFFERENCE = 1e-4
"""Largest difference of two scales that are the same but for rounding, as a share of the standard deviation."""


def as_recorded(autoencoder: dict[str, Any], folder: Path, path: str) -> dict[str, Any]:
    """Return the record of an autoencoder, with the digest by which the latents at a path know the same weights.

    folder: local folder of the autoencoder, whose file may have been saved again since it encoded them. If the weights
    are the same and its config computes something else, the record has the digest of the config as well, also for
    latents that are not finished.
    """
    from dit.formats.autoencoder_digests import config_sha256  # imports torch

    if not storage.exists(storage.join(path, MANIFEST)):
        begun = (Artifact("encode", path, {}).recorded() or {}).get("autoencoder", {})
        is_other = "config_sha256" in begun and begun["sha256"] == autoencoder["sha256"]
        return autoencoder | ({"config_sha256": config_sha256(folder)} if is_other else {})
    latents = LatentDataset.open(path)
    if is_autoencoder_of(latents.autoencoder, folder):
        autoencoder = autoencoder | {"sha256": latents.autoencoder["sha256"]}
        is_other = "config_sha256" in latents.identity.get("autoencoder", {})  # than that of the latents before
    else:
        weights = {name: value for name, value in latents.autoencoder.items() if name != "config_sha256"}
        is_other = is_autoencoder_of(weights, folder)
    return autoencoder | ({"config_sha256": config_sha256(folder)} if is_other else {})


def describe_recorded(autoencoder: AutoencoderHandle, path: str) -> dict[str, Any]:
    """Return what the latents at a path record about an autoencoder, or will record once they are encoded.

    Downloads nothing: raises NotFound for an autoencoder that is not on this machine.
    """
    from dit.formats.autoencoder_digests import further_digests  # imports torch

    folder = autoencoder.folder(download=False)
    return as_recorded(autoencoder.describe(download=False), folder, path) | further_digests(folder)


def scale_changes(folder: str, autoencoder: Mapping[str, Any]) -> list[str]:
    """Return in words how an autoencoder's scale differs from the one that latents record; nothing if it does not.

    folder: path or URI of the latents, which need not be finished. autoencoder: its record.
    """
    if not storage.exists(storage.join(folder, MANIFEST)):
        return []
    from dit.autoencoders.latent_scale import LatentScale, scale_of  # imports torch

    try:
        recorded, found = scale_of(LatentDataset.open(folder).autoencoder), scale_of(autoencoder)
    except (KeyError, TypeError, ValueError):
        return []  # what is wrong with the manifest is said where it is read

    def describe(scale: LatentScale, number: int) -> str:
        return f"mean {scale.mean[number]:.6g} and standard deviation {scale.std[number]:.6g}"

    if (recorded.shape, recorded.patch, len(recorded.std)) != (found.shape, found.patch, len(found.std)):
        return [f"autoencoder.scale: {len(recorded.std)} -> {len(found.std)} values"]
    before, after, std = np.array([recorded.mean, recorded.std]), np.array([found.mean, found.std]), np.array(found.std)
    differences = (np.abs(after - before) / std).max(axis=0)
    number = int(np.argmax(differences))
    if differences[number] <= MAX_DIFFERENCE:
        return []
    return [f"autoencoder.scale: {describe(recorded, number)} -> {describe(found, number)}"]
