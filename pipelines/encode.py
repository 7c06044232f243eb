"""The encode job: images -> moments in Parquet, exactly once, by Ray Data.

The unit of work and of resuming is a shard: a fixed part of the source's listing, and one file.
"""

import hashlib
import json
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster import storage
from pipelines.autoencoder import AutoencoderHandle, autoencoder_of
from pipelines.config.reader import resolved
from pipelines.config.recipe import EncodeConfig, ImagesConfig, Recipe
from pipelines.images.open import Listing, open_source
from pipelines.images.preprocess import read_cropped
from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset, channel_sums, write_manifest
from pipelines.latents.quarantine import QuarantineLimit
from pipelines.latents.shards import (
    RECORDS,
    Shard,
    claim,
    finished_records,
    plan_shards,
    read_records,
    remove_strays,
    shard_name,
    write_shard,
)
from pipelines.stage import StageContext, job, located

SHARDS_IN_FLIGHT = 16
"""Shards for each worker that the object store holds at most: being read, waiting, being encoded, being written.

Ray Data shares them out among its operators beforehand: of fewer, too few are read, and the autoencoder waits.
"""


@job
def encode(config: Recipe, *, context: StageContext) -> LatentDataset:
    """Encode the training images of a recipe, or the part of them that is still missing."""
    folder = config.latents
    listing, _ = open_source(config.images).listing().split(config.images.held_out)
    autoencoder = autoencoder_of(config).describe()
    identity = encode_identity(config, listing, autoencoder)
    earlier = claim(folder, identity, listing)
    if earlier is not None and earlier.manifest["identity"]["images"]["digest"] == listing.digest:
        context.skipped("encode", summary(earlier))
        return earlier

    description = describe(config, listing, autoencoder)
    shards = plan_shards(folder, listing, earlier, config.encode.shard_rows)
    if earlier is not None:
        context.say("encode", f"adds {sum(len(shard.images) for shard in shards):,} images to {summary(earlier)}")
    with context.run("encode", identity) as run:
        run.params({"images": asdict(config.images), "encode": asdict(config.encode)})
        run.input(name="images", digest=listing.digest, source=config.images.path, context="encoding")
        encode_missing(config, context, run, listing, shards, description, earlier)
        storage.remove_stale_temporaries(folder)
        remove_strays(folder, shards, earlier)
        records = finished_records(shards)
        dataset = write_manifest(folder, description, identity, records, recipe=resolved(config), earlier=earlier)
        storage.remove_folder(storage.join(folder, RECORDS))
        context.say("encode", summary(dataset))
        run.tag("raydit.latents_fingerprint", dataset.fingerprint)
        run.tag("raydit.latents", dataset.path)
    return dataset


def encode_missing(config, context, run, listing: Listing, shards, description, earlier) -> None:
    """See to it that every shard is finished, and say how it goes."""
    unusable = QuarantineLimit(config.latents, config.encode.max_quarantined, len(listing))
    unusable.add(earlier.quarantined() if earlier is not None else [])
    pending = []
    for shard, record in zip(shards, read_records(shards), strict=True):
        if record is None:
            pending.append(shard)
        else:
            unusable.add(record["quarantined"])
    done = len(listing) - sum(len(shard.images) for shard in pending)
    progress = context.progress("encode", total=len(listing), unit="images", start=done)
    with closing(encode_shards(config, context, pending, description)) as records:
        for record in records:
            unusable.add(record["quarantined"])
            progress.advance(record["rows"] + len(record["quarantined"]))
            run.metrics(
                {
                    "encode/images": progress.count - len(unusable.entries),
                    "encode/quarantined": len(unusable.entries),
                    "encode/images_per_second": progress.rate,
                },
                step=progress.count,
            )


def encode_shards(
    config: Recipe, context: StageContext, shards: list[Shard], description: dict
) -> Generator[dict, None, None]:
    """The graph: shards -> decoded and cropped images -> moments -> one Parquet file each -> records."""
    if not shards:
        return
    workers = config.encode
    ray_data = context.ray_data(workers, "encode")
    records = (
        ray_data.from_items([shard.task() for shard in shards], override_num_blocks=len(shards))
        .map(ReadImages(located(config.images)), num_cpus=1)
        .map(
            EncodeImages,
            fn_constructor_args=(autoencoder_of(config).located(), config.encode),
            # Two calls, of which one encodes at a time: the other takes in its images or hands over its moments.
            compute=ray_data.ActorPoolStrategy(size=workers.num_workers, max_concurrent_calls_per_actor=2),
            # Half a CPU: actors that hold every CPU leave none to read and write with, and the job hangs.
            num_cpus=0.5,
            num_gpus=workers.gpus_per_worker,
            **workers.placement,
        )
        .map(WriteShard(config.latents, description), num_cpus=0.5)
    )
    # Reading is faster than encoding: without a limit it runs ahead until half of the object store is full.
    limits = ray_data.ExecutionResources.for_limits(
        object_store_memory=SHARDS_IN_FLIGHT * workers.num_workers * shard_bytes(config, description)
    )
    records.context.execution_options.resource_limits = limits
    yield from (json.loads(row["record"]) for row in records.iter_rows())


def shard_bytes(config: Recipe, description: dict) -> int:
    """Of a shard's images and moments on their way between processes."""
    moments = (
        np.dtype(schema.MOMENTS_DTYPE).itemsize * math.prod(description["moments_shape"]) * (1 + config.encode.flip)
    )
    return config.encode.shard_rows * (3 * config.images.size**2 + moments)


class ReadImages:
    """keys -> images uint8 (N, size, size, 3), and the reason for each that could not be used."""

    def __init__(self, images: ImagesConfig):
        self.images = images

    def __call__(self, row: dict) -> dict:
        images, good, errors = read_cropped(self.images, row["keys"], row.get("places"))
        return {
            "shard": row["shard"],
            "listing": row["listing"],
            "keys": [row["keys"][position] for position in good],
            "labels": np.asarray(row["labels"], np.int32)[good],
            "images": images,
            "errors": json.dumps(errors),
        }


class EncodeImages:
    """images -> moments (and those of the mirrored images), on one device."""

    def __init__(self, autoencoder: AutoencoderHandle, config: EncodeConfig):
        import torch

        from dit.autoencoder import MEMORY_FORMATS, Autoencoder

        torch.set_num_threads(config.cpus_per_worker)
        self.batch_size = config.batch_size
        self.flip = config.flip
        self.device = "cuda" if config.gpus_per_worker else "cpu"
        self.memory_format = MEMORY_FORMATS[config.memory_format]
        self.autoencoder = Autoencoder.load(
            autoencoder.folder(), self.device, getattr(torch, config.dtype), self.memory_format
        )
        if config.compile:
            self.autoencoder.module.encoder.compile()

    def __call__(self, row: dict) -> dict:
        images = row.pop("images")
        row["moments"] = self.encode(images)
        row["moments_flip"] = self.encode(images[:, :, ::-1]) if self.flip else row["moments"][:0]
        return row

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float16 (N, 2C, h, w); infinite where the moments do not fit."""
        import torch

        from dit.autoencoder import images_from_uint8

        moments = []
        for start in range(0, max(1, len(images)), self.batch_size):
            batch = torch.zeros((self.batch_size, *images.shape[1:]), dtype=torch.uint8)
            part = images[start : start + self.batch_size]
            # Always a full batch: kernels chosen by batch size would make a shard's bytes depend on its length.
            batch[: len(part)] = torch.from_numpy(np.ascontiguousarray(part))
            pixels = images_from_uint8(batch).contiguous(memory_format=self.memory_format)
            moments.append(self.autoencoder.encode(pixels)[: len(part)].half().cpu())
        return torch.cat(moments).numpy()


class WriteShard:
    """moments -> part-00000.parquet and then its record, each whole or not there."""

    def __init__(self, folder: str, description: dict[str, Any]):
        self.folder = folder
        self.description = description

    def __call__(self, row: dict) -> dict:
        errors = json.loads(row["errors"])
        moments, flipped = row["moments"], row["moments_flip"]
        fits = np.isfinite(moments).all(axis=(1, 2, 3))
        if self.description["flip"]:
            fits &= np.isfinite(flipped).all(axis=(1, 2, 3))
        errors |= {row["keys"][i]: "moments do not fit float16" for i in np.flatnonzero(~fits)}
        keys = [row["keys"][i] for i in np.flatnonzero(fits)]
        table = schema.shard_table(
            schema.latent_schema(self.description),
            keys,
            np.asarray(row["labels"])[fits],
            moments[fits],
            flipped[fits] if self.description["flip"] else None,
        )
        data = schema.shard_bytes(table)
        record: dict[str, Any] = {
            "file": shard_name(row["shard"]),
            "listing": row["listing"],
            "rows": len(keys),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "channels": channel_sums(moments[fits]),
            "quarantined": [{"key": key, "error": error} for key, error in errors.items()],
        }
        write_shard(self.folder, row["shard"], data, record)
        return {"record": json.dumps(record)}


def encode_identity(config: Recipe, listing: Listing, autoencoder: dict) -> dict:
    """What the latents depend on: change any of it, and they are made anew."""
    settings = {name: getattr(config.encode, name) for name in ("flip", "shard_rows", "dtype")}
    # Named where they differ only: latents made before there was a choice stay valid, to the bit.
    for name, usual in (("memory_format", "channels_last"), ("compile", False)):
        if getattr(config.encode, name) != usual:
            settings[name] = getattr(config.encode, name)
    return {
        "images": {"digest": listing.digest, "count": len(listing), **preprocessing(config)},
        "autoencoder": {"sha256": autoencoder["sha256"]},
        "encode": settings,
    }


def preprocessing(config: Recipe) -> dict:
    """How images are cropped, as artifacts record it."""
    return {name: value for name, value in asdict(config.images).items() if name in ("size", "crop")}


def describe(config: Recipe, listing: Listing, autoencoder: dict) -> dict:
    """What the latents say of themselves."""
    side = config.images.size // autoencoder["downsample"]
    return schema.describe(
        moments_shape=(2 * autoencoder["latent_channels"], side, side),
        flip=config.encode.flip,
        autoencoder=autoencoder,
        preprocessing=preprocessing(config),
        class_names=listing.class_names,
    )


def summary(dataset: LatentDataset) -> str:
    """One line for people."""
    manifest = dataset.manifest
    bad = f", {manifest['quarantined']} quarantined (see quarantine.parquet)" if manifest["quarantined"] else ""
    return f"{len(dataset):,} latents{bad}, {dataset.num_bytes / 2**20:.1f} MiB in {dataset.path}"
