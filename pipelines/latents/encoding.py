"""The three steps of a shard: read its images, encode them into moments, write its file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from cluster import storage
from dit.hardware.device_errors import explain_full_memory, worker_device
from dit.hardware.measured_speeds import autoencoder_speedup
from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.images.preprocess import read_cropped_counting_low
from pipelines.latents import schema
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.moments import MomentsEncoder
from pipelines.latents.quarantine import MOMENTS_ARE_NAN
from pipelines.latents.records import QuarantinedImage, ShardRecord
from pipelines.latents.schema import LatentDescription
from pipelines.latents.shards import ShardTask, shard_name, write_shard
from pipelines.latents.source_images import image_digests
from pipelines.latents.statistics import channel_sums
from raydit.compilers import explain_failed_compilation

if TYPE_CHECKING:
    import pyarrow as pa

LESS_MEMORY = "lower encode.batch_size, and run the same command again: it resumes"
"""What to do if the memory of a worker is not enough."""


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
    locations: NotRequired[np.ndarray]
    """`Listing.locations` of the images, int64 (N, 2), if the listing has any."""


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
    image_digests: NotRequired[np.ndarray]
    """uint8 (N, 16), if no moments are stored."""
    locations: NotRequired[np.ndarray]
    """int64 (N, 2), if no moments are stored and the listing has any."""


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


def explain_faster_encoding(settings: EncodeConfig) -> list[str]:
    """Return in a line what another dtype takes, if workers on GPUs are to encode in float32."""
    if not settings.gpus_per_worker or settings.dtype != "float32":
        return []
    return [
        f"encodes in float32; {autoencoder_speedup('encode')}, with latents of its own, which can depend on the batch"
    ]


class ReadImages:
    """Read and crop the images of a shard."""

    def __init__(self, images: ImagesConfig, shared: storage.SharedFolder | None = None):
        """shared: a folder for which all workers must have the same one, before anything is encoded."""
        self.images = images
        self.shared = shared

    def __call__(self, row: ShardTask) -> ReadShard:
        if self.shared is not None:
            self.shared.require()
        (images, positions, errors), num_low = read_cropped_counting_low(self.images, row["keys"], row.get("locations"))
        shard: ReadShard = {
            "shard": row["shard"],
            "listing": row["listing"],
            "keys": [row["keys"][position] for position in positions],
            "labels": np.asarray(row["labels"], np.int32)[positions],
            "images": images,
            "errors": json.dumps(errors),
            "num_low": num_low,
        }
        if "locations" in row:
            shard["locations"] = np.asarray(row["locations"], np.int64).reshape(-1, 2)[positions]
        return shard


class EncodeImages(MomentsEncoder):
    """Encode the images of a shard into moments, on the device of a worker of the encode job."""

    def __init__(
        self, autoencoder: AutoencoderHandle, settings: EncodeConfig, recorded: Mapping[str, Any] | None = None
    ):
        """Load the autoencoder. recorded: its record; raises InvalidInput if this worker finds another one."""
        import torch

        torch.set_num_threads(settings.cpus_per_worker)
        device = torch.device(worker_device(settings.gpus_per_worker))
        with explain_full_memory(LESS_MEMORY):
            super().__init__(autoencoder, settings, device, recorded)

    def __call__(self, row: ReadShard) -> EncodedShard:
        with explain_failed_compilation(), explain_full_memory(LESS_MEMORY):
            moments, moments_flip = self.encode_with_flip(row["images"])
        encoded: EncodedShard = {
            "shard": row["shard"],
            "listing": row["listing"],
            "keys": row["keys"],
            "labels": row["labels"],
            "moments": moments,
            "moments_flip": moments_flip,
            "errors": row["errors"],
            "num_low": row.get("num_low", 0),
        }
        if not self.settings.stores_moments:
            encoded["image_digests"] = image_digests(row["images"])
            if "locations" in row:
                encoded["locations"] = row["locations"]
        return encoded


class WriteShard:
    """Write a shard's Parquet file and then its record, each atomically."""

    def __init__(
        self,
        folder: str,
        description: LatentDescription,
        settings: str | None = None,
        shared: storage.SharedFolder | None = None,
    ):
        """settings: `settings_digest` of the latents, which the records name. shared: as in `ReadImages`."""
        self.folder = folder
        self.description = description
        self.settings = settings
        self.shared = shared

    def __call__(self, row: EncodedShard) -> WrittenShard:
        if self.shared is not None:
            self.shared.require()
        errors = json.loads(row["errors"])
        moments, moments_flip = row["moments"], row["moments_flip"]
        fits = np.isfinite(moments).all(axis=(1, 2, 3))
        if self.description.flip:
            fits &= np.isfinite(moments_flip).all(axis=(1, 2, 3))
        for i in np.flatnonzero(~fits):
            is_nan = np.isnan(moments[i]).any() or (self.description.flip and np.isnan(moments_flip[i]).any())
            errors[row["keys"][i]] = MOMENTS_ARE_NAN if is_nan else "moments do not fit float16"
        keys = [row["keys"][i] for i in np.flatnonzero(fits)]
        data = schema.parquet_bytes(self._table(row, keys, fits))
        record = ShardRecord(
            file=shard_name(row["shard"]),
            listing=row["listing"],
            rows=len(keys),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            channels=channel_sums(moments[fits], deterministic=self.description.posterior is not None),
            quarantined=tuple(QuarantinedImage(key, error) for key, error in errors.items()),
            num_low=int(row.get("num_low", 0)),
            settings=self.settings,
        )
        write_shard(self.folder, row["shard"], data, record)
        return {"record": json.dumps(record.to_json())}

    def _table(self, row: EncodedShard, keys: Sequence[str], fits: np.ndarray) -> "pa.Table":
        """Return the table of the images that can be used. fits: bool (N,), whether each can."""
        arrow_schema, labels = schema.latent_schema(self.description), np.asarray(row["labels"])[fits]
        if self.description.encoding is None:
            moments_flip = row["moments_flip"][fits] if self.description.flip else None
            return schema.shard_table(arrow_schema, keys, labels, row["moments"][fits], moments_flip)
        locations = np.asarray(row["locations"])[fits] if "locations" in row else None
        return schema.image_table(arrow_schema, keys, labels, np.asarray(row["image_digests"])[fits], locations)
