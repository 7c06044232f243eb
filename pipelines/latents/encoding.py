"""The three steps of a shard: read its images, encode them into moments, write its file."""

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np

from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.images.preprocess import read_cropped_counting_low
from pipelines.latents import schema
from pipelines.latents.autoencoder import AutoencoderHandle, is_autoencoder_of
from pipelines.latents.quarantine import MOMENTS_ARE_NAN
from pipelines.latents.records import QuarantinedImage, ShardRecord
from pipelines.latents.schema import LatentDescription
from pipelines.latents.shards import ShardTask, shard_name, write_shard
from pipelines.latents.statistics import channel_sums
from raydit.errors import InvalidInput


class ReadShard(TypedDict):
    """A shard's images that could be used, as a row of Ray Data."""

    shard: int
    listing: str
    keys: list[str]
    labels: np.ndarray
    """int32 (N,)."""
    images: np.ndarray
    """uint8 (N, size, size, 3)."""
    errors: str
    """JSON: keys of the other images, and why they cannot be used."""
    num_low: NotRequired[int]
    """Images that are nearly black because their files hold 10 or 12 of 16 bits."""


class EncodedShard(TypedDict):
    """A shard's moments, as a row of Ray Data."""

    shard: int
    listing: str
    keys: list[str]
    labels: np.ndarray
    moments: np.ndarray
    """float16 (N, *moments_shape): (N, 2C, h, w), or (N, C, h, w) if the posterior is deterministic."""
    moments_flip: np.ndarray
    """The same of the horizontally flipped images; no rows unless encode.flip is set."""
    errors: str
    num_low: NotRequired[int]


class WrittenShard(TypedDict):
    """A finished shard, as a row of Ray Data."""

    record: str
    """`ShardRecord` as JSON."""


def bytes_in_flight(description: LatentDescription, shard_rows: int) -> int:
    """Return the bytes of one shard's images and moments on their way between processes."""
    moments = schema.moments_bytes(description.moments_shape, description.flip)
    return shard_rows * (3 * description.preprocessing["size"] ** 2 + moments)


def device_without_tf32(settings: EncodeConfig) -> str | None:
    """Return which device has no TF32, in words, if the settings ask for TF32 and the workers' device has none.

    Asks a GPU like the workers' by a Ray task, on a started Ray, because this process need not have one.
    """
    if settings.dtype != "tf32":
        return None
    from dit.precision import missing_tf32  # imports torch

    if not settings.gpus_per_worker:
        return missing_tf32("tf32", "cpu")
    import ray

    ask = ray.remote(num_cpus=0, num_gpus=settings.gpus_per_worker, **settings.placement)(missing_tf32)
    answer: str | None = ray.get(ask.remote("tf32", "cuda"))
    return answer


class ReadImages:
    """Read and crop the images of a shard."""

    def __init__(self, images: ImagesConfig):
        self.images = images

    def __call__(self, row: ShardTask) -> ReadShard:
        (images, positions, errors), num_low = read_cropped_counting_low(self.images, row["keys"], row.get("locations"))
        return {
            "shard": row["shard"],
            "listing": row["listing"],
            "keys": [row["keys"][position] for position in positions],
            "labels": np.asarray(row["labels"], np.int32)[positions],
            "images": images,
            "errors": json.dumps(errors),
            "num_low": num_low,
        }


class EncodeImages:
    """Encode images, and their horizontal flips if encode.flip is set, into moments on one device."""

    def __init__(
        self, autoencoder: AutoencoderHandle, settings: EncodeConfig, recorded: Mapping[str, Any] | None = None
    ):
        """Load the autoencoder. recorded: its record; raises InvalidInput if this worker finds another one."""
        import torch

        from dit.autoencoder import MEMORY_FORMATS, Autoencoder
        from dit.precision import weights_dtype

        folder = autoencoder.folder()
        if recorded is not None and not is_autoencoder_of(recorded, folder):
            raise InvalidInput(
                f"autoencoder.id: found another autoencoder in {folder} on {platform.node()}",
                f"the one of sha256 {recorded['sha256'][:12]}, as where the command runs",
                "copy the same files to all machines",
            )

        torch.set_num_threads(settings.cpus_per_worker)
        self.batch_size = settings.batch_size
        self.flip, self.dtype = settings.flip, settings.dtype
        self.device = "cuda" if settings.gpus_per_worker else "cpu"
        self.memory_format = MEMORY_FORMATS[settings.layout]
        self.autoencoder = Autoencoder.load(folder, self.device, weights_dtype(self.dtype), self.memory_format)
        if settings.compile:
            self.autoencoder.module.encoder.compile()

    def __call__(self, row: ReadShard) -> EncodedShard:
        moments, moments_flip = self.encode_with_flip(row["images"])
        return {
            "shard": row["shard"],
            "listing": row["listing"],
            "keys": row["keys"],
            "labels": row["labels"],
            "moments": moments,
            "moments_flip": moments_flip,
            "errors": row["errors"],
            "num_low": row.get("num_low", 0),
        }

    def encode_with_flip(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the moments of images, and those of their horizontal flips: no rows unless encode.flip is set.

        images: uint8 (N, H, W, 3). Moments: float16 (N, *moments_shape).
        """
        moments = self.encode(images)
        return moments, self.encode(images[:, :, ::-1]) if self.flip else moments[:0]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images uint8 (N, H, W, 3) into moments float16 (N, *moments_shape), infinite if beyond its range."""
        import torch

        from dit.autoencoder import images_from_uint8
        from dit.precision import tf32_products

        moments = []
        for start in range(0, max(1, len(images)), self.batch_size):
            batch = torch.zeros((self.batch_size, *images.shape[1:]), dtype=torch.uint8)
            part = images[start : start + self.batch_size]
            # Always a full batch: kernels chosen by batch size would make a shard's bytes depend on its length.
            batch[: len(part)] = torch.from_numpy(part.copy())  # contiguous, also if it is a flip of no images
            pixels = images_from_uint8(batch).contiguous(memory_format=self.memory_format)
            with tf32_products(self.device, self.dtype):
                encoded = self.autoencoder.encode(pixels)
            moments.append(encoded[: len(part)].half().cpu())
        return torch.cat(moments).numpy()


class WriteShard:
    """Write a shard's Parquet file and then its record, each atomically."""

    def __init__(self, folder: str, description: LatentDescription):
        self.folder = folder
        self.description = description

    def __call__(self, row: EncodedShard) -> WrittenShard:
        errors = json.loads(row["errors"])
        moments, moments_flip = row["moments"], row["moments_flip"]
        fits = np.isfinite(moments).all(axis=(1, 2, 3))
        if self.description.flip:
            fits &= np.isfinite(moments_flip).all(axis=(1, 2, 3))
        for i in np.flatnonzero(~fits):
            is_nan = np.isnan(moments[i]).any() or (self.description.flip and np.isnan(moments_flip[i]).any())
            errors[row["keys"][i]] = MOMENTS_ARE_NAN if is_nan else "moments do not fit float16"
        keys = [row["keys"][i] for i in np.flatnonzero(fits)]
        table = schema.shard_table(
            schema.latent_schema(self.description),
            keys,
            np.asarray(row["labels"])[fits],
            moments[fits],
            moments_flip[fits] if self.description.flip else None,
        )
        data = schema.parquet_bytes(table)
        record = ShardRecord(
            file=shard_name(row["shard"]),
            listing=row["listing"],
            rows=len(keys),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            channels=channel_sums(moments[fits], deterministic=self.description.posterior is not None),
            quarantined=tuple(QuarantinedImage(key, error) for key, error in errors.items()),
            num_low=int(row.get("num_low", 0)),
        )
        write_shard(self.folder, row["shard"], data, record)
        return {"record": json.dumps(record.to_json())}
