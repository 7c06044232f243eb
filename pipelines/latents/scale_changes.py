"""Compare the scale that latents record with the one that their autoencoder has by now.

The scale is no part of the latents' identity: the moments do not depend on it, and earlier latents record none there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster import storage
from pipelines.latents.dataset import MANIFEST, LatentDataset

MAX_DIFFERENCE = 1e-4
"""Largest difference of two scales that are the same but for rounding, as a share of the standard deviation."""


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
