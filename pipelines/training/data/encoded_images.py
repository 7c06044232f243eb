"""Training batches of images that are encoded while training, where the latent data set holds no moments.

A worker reads the images of its share, some batches ahead, in threads, and encodes them on its own device in the thread
that prepares batches. Order, horizontal flips and random draws are those of stored moments, and so are the moments
themselves, in float16, up to rounding where another device or number of threads encodes. Batches of the autoencoder
have one size, whatever the worker's share, so that moments do not depend on the number of workers.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.open import with_absolute_paths
from pipelines.latents.autoencoder import AutoencoderHandle, autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.moments import MomentsEncoder
from pipelines.latents.source_images import SourceImages
from pipelines.training.data.order import EpochOrder, WorkerShare, batch_rows
from raydit.errors import InvalidInput

BATCHES_AHEAD = 3
"""Batches whose images a worker reads in advance, the current one included."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoding:
    """How workers read and encode images while training."""

    images: ImagesConfig
    """Settings with which the images are read."""
    encode: EncodeConfig
    """Precision, batch size and memory layout of the autoencoder."""
    autoencoder: AutoencoderHandle
    recorded: dict[str, Any]
    """The autoencoder's record, with which workers check that they loaded the same one."""
    locations: np.ndarray | None = None
    """Locations of the images in the source, as `pipelines.latents.source_images.find_locations` returns them; None if
    the source looks them up itself."""


def image_encoding(config: Recipe, latents: LatentDataset) -> ImageEncoding:
    """Return how a recipe's images are encoded while training: as its latents record it.

    Raises InvalidInput for settings that such a training cannot have: the latents may be another recipe's.
    """
    encoding = latents.description.encoding
    assert encoding is not None, "the data set holds no moments"
    config.check_encoding_in_training()
    # As the images were listed: where the output began in an earlier release, splits are recognised as in that one.
    recorded = latents.recipe.get("images", {})
    return ImageEncoding(
        images=with_absolute_paths(replace(config.images, reading=recorded.get("reading"), **latents.preprocessing)),
        encode=replace(config.encode, **encoding),
        autoencoder=autoencoder_of(config).with_absolute_paths(),
        recorded=latents.autoencoder,
    )


class EncodedImages:
    """A LatentSource that reads the images of a data set without moments, and encodes them."""

    def __init__(
        self,
        dataset: LatentDataset,
        encoding: ImageEncoding,
        share: WorkerShare,
        device: torch.device,
        *,
        seed: int,
        threads: int,
    ):
        """Load the autoencoder onto a device. threads: that read images.

        Raises InvalidInput if this machine finds another autoencoder than the one that the data set records.
        """
        self.latent_shape, self.moments_shape = dataset.latent_shape, dataset.moments_shape
        self.order = EpochOrder(len(dataset), seed)
        self._share, self._threads, self._has_flip = share, threads, dataset.has_flip
        self._source = SourceImages(dataset, encoding.images, encoding.locations)
        self._encoder = MomentsEncoder(encoding.autoencoder, encoding.encode, device, encoding.recorded)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._ahead: dict[bytes, _ReadAhead] = {}

    def read(self, rows: np.ndarray, flip: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """Encode the images at some rows, as `LatentSource.read` copies stored moments.

        Raises InvalidInput, naming the image, if one cannot be read any more, is another one, or is not encoded to
        finite moments.
        """
        images = (self._ahead.pop(rows.tobytes(), None) or self._start(rows)).result()
        if self._has_flip:
            images[flip] = images[flip, :, ::-1]
        moments[:] = self._encoder.encode(images)
        is_finite = np.isfinite(moments).all(axis=(1, 2, 3))
        if not is_finite.all():
            key = self._source.keys(rows[~is_finite])[0]
            raise InvalidInput(
                f"{key}: the autoencoder on {self._encoder.device} makes moments of it that float16 does not hold",
                "finite ones, as `raydit encode` found them",
                "run `raydit encode` on the same kind of device as training, or choose another encode.dtype",
            )
        return self._source.labels[rows]

    def prefetch(self, position: int) -> None:
        """Start to read the images of the batch at a position in the order, and of those after it."""
        number = position // self._share.global_batch_size
        needed = [batch_rows(self.order, self._share, number + ahead) for ahead in range(BATCHES_AHEAD)]
        self._ahead = {rows.tobytes(): self._ahead.get(rows.tobytes()) or self._start(rows) for rows in needed}

    def _start(self, rows: np.ndarray) -> "_ReadAhead":
        # In the order of the source, in which neighbours are read together.
        by_row = np.argsort(rows, kind="stable")
        parts = [part for part in np.array_split(by_row, self._threads) if len(part)]
        return _ReadAhead([(part, self._pool.submit(self._source.read, rows[part])) for part in parts])


class _ReadAhead:
    """The images of a batch that are being read, in parts."""

    def __init__(self, parts: list[tuple[np.ndarray, Future[np.ndarray]]]):
        """parts: positions in the batch, each with the images there."""
        self._parts = parts

    def result(self) -> np.ndarray:
        """Wait for all images and return them, uint8 (n, size, size, 3). Raises the error of a part that failed."""
        read = np.concatenate([future.result() for _, future in self._parts])
        images = np.empty_like(read)
        images[np.concatenate([positions for positions, _ in self._parts])] = read
        return images


def explain_padding(encoding: ImageEncoding, share: WorkerShare) -> str:
    """Return in words how much of the autoencoder's work fills up batches; empty if little of it does."""
    count, batch_size = len(share.positions()), encoding.encode.batch_size
    padded = -(-count // batch_size) * batch_size
    if padded <= 1.25 * count:
        return ""
    return (
        f"encode.batch_size = {batch_size}: a worker's share of {count} images is filled up to {padded} before it is "
        f"encoded, so that moments do not depend on the number of workers; with --set encode.batch_size={count} "
        f"{1 - count / padded:.0%} of the autoencoder's work is saved"
    )
