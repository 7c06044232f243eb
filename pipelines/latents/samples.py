"""A few rows of a latent data set, with their images and the autoencoder, to show them and to verify them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from pipelines.images.validation import held_out_source
from pipelines.latents import schema
from pipelines.latents.autoencoder import AutoencoderHandle, explain_other, is_autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.held_out import is_held_out
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from dit.autoencoder import Autoencoder
    from pipelines.config.recipe import ImagesConfig

BATCH_SIZE = 16
"""Images per pass through the autoencoder."""


@dataclass(frozen=True)
class LatentRows:
    """Some rows of a latent data set."""

    keys: list[str]
    labels: np.ndarray
    """int32 (N,)."""
    moments: np.ndarray | None
    """float16 (N, *moments_shape); None if they are not stored."""
    moments_flip: np.ndarray | None
    """Moments of the horizontally flipped images, float16 (N, *moments_shape); None if they are not stored."""


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """Return at most `count` positions, evenly spaced over range(length), int64 in rising order."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))


def read_rows(dataset: LatentDataset, positions: np.ndarray) -> LatentRows:
    """Read rows by their positions in the data set, which must rise.

    Raises InvalidInput if the data set has no rows, or a shard is missing or truncated.
    """
    import pyarrow as pa

    if not len(positions):
        raise InvalidInput(
            f"{dataset.path}: found no rows", "latents of some images", "see quarantine.parquet there for the reasons"
        )
    parts, first = [], 0
    for table in dataset.tables():
        inside = positions[(positions >= first) & (positions < first + table.num_rows)]
        parts.append(table.take(pa.array(inside - first)))
        first += table.num_rows
    table, shape = pa.concat_tables(parts), dataset.moments_shape

    def moments(name: str) -> np.ndarray | None:
        return schema.moments_array(table.column(name), shape) if name in table.column_names else None

    return LatentRows(
        keys=table.column(schema.KEY).to_pylist(),
        labels=table.column(schema.LABEL).to_numpy(),
        moments=moments(schema.MOMENTS),
        moments_flip=moments(schema.MOMENTS_FLIP),
    )


def read_images(dataset: LatentDataset, keys: Sequence[str]) -> np.ndarray:
    """Read the images that were encoded, uint8 (N, size, size, 3), as the data set's recipe finds and crops them.

    Raises InvalidInput or NotFound if the source or an image cannot be read any more.
    """
    from pipelines.images.preprocess import read_cropped

    images, _, errors = read_cropped(source_of(dataset), keys)
    if errors:
        key, error = next(iter(errors.items()))
        raise InvalidInput(
            f"images.path: {len(errors)} of {len(keys)} images cannot be read any more, such as {key}: {error}",
            "the images that were encoded",
            "restore them",
        )
    return images


def source_of(dataset: LatentDataset) -> "ImagesConfig":
    """Return the [images] by which a data set's recipe reads its images."""
    from pipelines.config.reader import validate_recipe

    images = validate_recipe(dataset.recipe, stage="encode").images
    return held_out_source(images) if is_held_out(dataset) else images


def load_autoencoder(dataset: LatentDataset, *, download: bool) -> "Autoencoder":
    """Load the autoencoder that encoded a data set.

    Raises NotFound if it is missing, and InvalidInput if the one with its name has other weights.
    """
    from dit.autoencoder import Autoencoder

    recorded = dataset.autoencoder
    # An autoencoder trained by raydit has the same parent folder: output/autoencoder and output/latents.
    folder = AutoencoderHandle(recorded["id"], storage.split(dataset.path)[0]).folder(download=download)
    if not is_autoencoder_of(recorded, folder):
        raise InvalidInput(
            f"{folder}: found an autoencoder with {explain_other(recorded, folder)}",
            f"the one with {recorded['sha256'][:12]}, which encoded {dataset.path}",
            "restore that one",
        )
    return Autoencoder.load(folder)


def decode_moments(autoencoder: "Autoencoder", moments: np.ndarray) -> np.ndarray:
    """Decode the posterior means of moments (N, *moments_shape) into images uint8 (N, H, W, 3)."""
    means = moments[:, : autoencoder.latent_channels].astype(np.float32)
    batches = to_tensor(means).split(BATCH_SIZE)
    return np.concatenate([autoencoder.decode(autoencoder.scale.scale(batch)).numpy() for batch in batches])


def encode_images(autoencoder: "Autoencoder", images: np.ndarray) -> np.ndarray:
    """Encode images uint8 (N, H, W, 3) into moments float32 (N, *moments_shape)."""
    from dit.autoencoder import images_from_uint8

    batches = to_tensor(images).split(BATCH_SIZE)
    return np.concatenate([autoencoder.encode(images_from_uint8(batch)).numpy() for batch in batches])


def to_tensor(array: np.ndarray) -> "Tensor":
    """Return an array as a tensor; one with negative strides is copied."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
