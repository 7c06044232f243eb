"""Small latent data sets, written without encoding anything."""

import hashlib

import numpy as np

from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset, write_manifest
from pipelines.latents.records import QuarantinedImage, ShardRecord
from pipelines.latents.schema import LatentDescription
from pipelines.latents.statistics import channel_sums

SHAPE = (4, 3, 5)
AUTOENCODER = {"id": "here", "sha256": "ab", "latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}


def description(flip=False, id="here", shape=SHAPE) -> LatentDescription:
    return LatentDescription(
        moments_shape=shape,
        flip=flip,
        autoencoder={**AUTOENCODER, "id": id},
        preprocessing={"size": 12, "crop": "adm"},
        class_names=("cat", "dog"),
    )


def make_moments(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, *SHAPE)).astype("<f2")


def shard(moments, flip=False, first=0, **settings):
    keys = [f"k{first + row}" for row in range(len(moments))]
    table = schema.shard_table(
        schema.latent_schema(description(flip, shape=moments.shape[1:], **settings)),
        keys,
        np.arange(len(moments)) % 2,
        moments,
        moments[..., ::-1] if flip else None,
    )
    return schema.parquet_bytes(table)


def make_record(index: int, moments: np.ndarray, data: bytes, quarantined=()) -> ShardRecord:
    """The record of a shard whose Parquet file holds `data`."""
    return ShardRecord(
        file=f"part-{index:05d}.parquet",
        listing="",
        rows=len(moments),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        channels=channel_sums(moments),
        quarantined=tuple(quarantined),
    )


def write_dataset(folder, parts, flip=False, quarantined=(), **settings) -> LatentDataset:
    folder.mkdir(parents=True, exist_ok=True)
    records, first = [], 0
    for index, moments in enumerate(parts):
        data = shard(moments, flip, first, **settings)
        first += len(moments)
        (folder / f"part-{index:05d}.parquet").write_bytes(data)
        bad = tuple(QuarantinedImage(key, "bad") for key in quarantined) if index == 0 else ()
        records.append(make_record(index, moments, data, bad))
    described = description(flip, shape=parts[0].shape[1:] if parts else SHAPE, **settings)
    return write_manifest(str(folder), described, {"seed": 0}, records, recipe={})
