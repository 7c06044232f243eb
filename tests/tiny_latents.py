"""Small latent data sets, written without encoding anything."""

import hashlib

import numpy as np

from pipelines.latents import schema
from pipelines.latents.dataset import channel_sums, write_manifest

SHAPE = (4, 3, 5)
AUTOENCODER = {"id": "here", "sha256": "ab", "latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}


def description(flip=False, id="here", shape=SHAPE):
    return schema.describe(
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


def write_dataset(folder, parts, flip=False, quarantined=(), **settings):
    folder.mkdir(parents=True, exist_ok=True)
    records, first = [], 0
    for index, moments in enumerate(parts):
        data = shard(moments, flip, first, **settings)
        first += len(moments)
        (folder / f"part-{index:05d}.parquet").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        record = {"file": f"part-{index:05d}.parquet", "rows": len(moments), "bytes": len(data), "sha256": digest}
        records.append({**record, "channels": channel_sums(moments), "quarantined": []})
    if records:
        records[0]["quarantined"] = [{"key": key, "error": "bad"} for key in quarantined]
    described = description(flip, shape=parts[0].shape[1:] if parts else SHAPE, **settings)
    return write_manifest(str(folder), described, {"seed": 0}, records, recipe={})
