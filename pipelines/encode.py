"""The encode job: images -> moments in Parquet, exactly once, by Ray Data.

The unit of work and of resuming is a shard: a fixed range of the source's listing, and one file. A shard is
finished when its record is written, which happens after its file is; whatever was cut off is done again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from evaluation.protocol import shard_ranges
from pipelines import schema
from pipelines.autoencoder import autoencoder_of
from pipelines.config import EncodeConfig, ImagesConfig, Recipe
from pipelines.identity import Artifact
from pipelines.images import Listing, open_source
from pipelines.latents import MANIFEST, LatentDataset, channel_sums, write_manifest
from pipelines.preprocess import read_cropped
from pipelines.stage import StageContext, job

RECORDS = ".records"


@job
def encode(config: Recipe, *, context: StageContext) -> LatentDataset:
    """Encode the training images of a recipe, or the part of them that is still missing."""
    folder = config.folder("latents")
    listing, _ = open_source(config.images).listing().split(config.images.held_out)
    autoencoder = autoencoder_of(config).describe()
    identity = encode_identity(config, listing, autoencoder)
    Artifact("encode", folder, identity).claim()
    if (folder / MANIFEST).is_file():
        dataset = LatentDataset.open(folder)
        context.skipped("encode", summary(dataset))
        return dataset

    description = describe(config, listing, autoencoder)
    shards = shard_ranges(len(listing), config.encode.shard_rows)
    pending = [index for index in range(len(shards)) if read_record(folder, index) is None]
    with context.run("encode", identity) as run:
        run.params({"images": asdict(config.images), "encode": asdict(config.encode)})
        done = len(listing) - sum(len(shards[index]) for index in pending)
        progress = context.progress("encode", total=len(listing), unit="images", start=done)
        for record in encode_shards(config, context, listing, shards, pending, description):
            progress.advance(record["rows"] + len(record["quarantined"]))
        dataset = write_manifest(folder, description, identity, finished_records(folder, len(shards)))
        storage.remove_folder(str(folder / RECORDS))
        progress.done(summary(dataset))
        run.tag("raydit.latents_fingerprint", dataset.fingerprint)
        run.input(name="images", digest=listing.digest, source=config.images.path, context="encoding")
        run.metrics({
            "encode/images": len(dataset),
            "encode/quarantined": dataset.manifest["quarantined"],
            "encode/images_per_second": progress.rate,
        })  # fmt: skip
    return dataset


def encode_shards(config, context, listing: Listing, shards, pending, description) -> Iterator[dict]:
    """The graph: shards -> decoded and cropped images -> moments -> one Parquet file each -> records."""
    if not pending:
        return
    workers = config.encode
    ray_data = context.ray_data(workers, "encode")
    rows = [
        {
            "shard": index,
            "keys": [listing.keys[i] for i in shards[index]],
            "labels": listing.labels[shards[index]],
        }
        for index in pending
    ]
    records = (
        ray_data.from_items(rows, override_num_blocks=len(rows))
        .map(ReadImages(config.images), num_cpus=1)
        .map(
            EncodeImages,
            fn_constructor_args=(str(autoencoder_of(config).folder()), config.encode),
            compute=ray_data.ActorPoolStrategy(size=workers.num_workers),
            # Half a CPU: actors that hold every CPU leave none to read and write with, and the job hangs.
            num_cpus=0.5,
            num_gpus=workers.gpus_per_worker,
        )
        .map(WriteShard(config.folder("latents"), description), num_cpus=0.5)
    )
    yield from (json.loads(row["record"]) for row in records.iter_rows())


class ReadImages:
    """keys -> images uint8 (N, size, size, 3), and the reason for each that could not be used."""

    def __init__(self, images: ImagesConfig):
        self.images = images

    def __call__(self, row: dict) -> dict:
        images, good, errors = read_cropped(self.images, row["keys"])
        return {
            "shard": row["shard"],
            "keys": [row["keys"][position] for position in good],
            "labels": np.asarray(row["labels"], np.int32)[good],
            "images": images,
            "errors": json.dumps(errors),
        }


class EncodeImages:
    """images -> moments (and those of the mirrored images), on one device."""

    def __init__(self, autoencoder: str, config: EncodeConfig):
        import torch

        from dit.autoencoder import MEMORY_FORMATS, Autoencoder

        torch.set_num_threads(config.cpus_per_worker)
        self.batch_size = config.batch_size
        self.flip = config.flip
        self.device = "cuda" if config.gpus_per_worker else "cpu"
        self.autoencoder = Autoencoder.load(
            autoencoder, self.device, getattr(torch, config.dtype), MEMORY_FORMATS[config.memory_format]
        )

    def __call__(self, row: dict) -> dict:
        images = row.pop("images")
        row["moments"] = self._encode(images)
        row["moments_flip"] = self._encode(images[:, :, ::-1]) if self.flip else row["moments"][:0]
        return row

    def _encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, 2C, h, w)."""
        import torch

        from dit.autoencoder import images_from_uint8

        moments = []
        for start in range(0, max(1, len(images)), self.batch_size):
            batch = torch.zeros((self.batch_size, *images.shape[1:]), dtype=torch.uint8)
            part = images[start : start + self.batch_size]
            # Always a full batch: kernels chosen by batch size would make a shard's bytes depend on its length.
            batch[: len(part)] = torch.from_numpy(np.ascontiguousarray(part))
            moments.append(self.autoencoder.encode(images_from_uint8(batch))[: len(part)].cpu())
        return torch.cat(moments).numpy()


class WriteShard:
    """moments -> part-00000.parquet and then its record, each written to a temporary name and renamed."""

    def __init__(self, folder: Path, description: dict[str, Any]):
        self.folder = folder
        self.description = description

    def __call__(self, row: dict) -> dict:
        errors = json.loads(row["errors"])
        moments, flipped = row["moments"], row["moments_flip"]
        limit = float(np.finfo(schema.MOMENTS_DTYPE).max)
        fits = (np.abs(moments) <= limit).all(axis=(1, 2, 3))
        if self.description["flip"]:
            fits &= (np.abs(flipped) <= limit).all(axis=(1, 2, 3))
        errors |= {row["keys"][i]: "moments do not fit float16" for i in np.flatnonzero(~fits)}
        keys = [row["keys"][i] for i in np.flatnonzero(fits)]
        stored = moments[fits].astype(schema.MOMENTS_DTYPE)
        table = schema.shard_table(
            schema.latent_schema(self.description),
            keys,
            np.asarray(row["labels"])[fits],
            stored,
            flipped[fits] if self.description["flip"] else None,
        )
        data = schema.shard_bytes(table)
        record: dict[str, Any] = {
            "file": shard_file(row["shard"]),
            "rows": len(keys),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "channels": channel_sums(stored),
            "quarantined": [{"key": key, "error": error} for key, error in errors.items()],
        }
        storage.write_atomically(str(self.folder / record["file"]), data)
        storage.write_json_atomically(str(record_path(self.folder, row["shard"])), record)
        return {"record": json.dumps(record)}


def shard_file(index: int) -> str:
    return f"part-{index:05d}.parquet"


def record_path(folder: Path, index: int) -> Path:
    return folder / RECORDS / f"part-{index:05d}.json"


def read_record(folder: Path, index: int) -> dict | None:
    """Record of a finished shard, or None. A record whose file is missing or cut does not count."""
    path = record_path(folder, index)
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    file = folder / record["file"]
    return record if file.is_file() and file.stat().st_size == record["bytes"] else None


def finished_records(folder: Path, count: int) -> list[dict]:
    """Records of all shards. Raises ValueError if one is gone: something else changed the folder meanwhile."""
    records = []
    for index in range(count):
        if (record := read_record(folder, index)) is None:
            raise ValueError(
                f"{folder / shard_file(index)}: found no finished file and record of this shard, which was written a "
                "moment ago. Another process changes this folder; stop it and run again"
            )
        records.append(record)
    return records


def encode_identity(config: Recipe, listing: Listing, autoencoder: dict) -> dict:
    """What the latents depend on: change any of it, and they are made anew."""
    settings = {name: getattr(config.encode, name) for name in ("flip", "shard_rows", "dtype")}
    if config.encode.memory_format != "contiguous":  # latents made before there was a choice stay valid
        settings["memory_format"] = config.encode.memory_format
    return {
        "images": {"digest": listing.digest, "count": len(listing), **preprocessing(config)},
        "autoencoder": {"sha256": autoencoder["sha256"]},
        "encode": settings,
    }


def preprocessing(config: Recipe) -> dict:
    return {name: value for name, value in asdict(config.images).items() if name in ("size", "crop")}


def describe(config: Recipe, listing: Listing, autoencoder: dict) -> dict:
    side = config.images.size // autoencoder["downsample"]
    return schema.describe(
        moments_shape=(2 * autoencoder["latent_channels"], side, side),
        flip=config.encode.flip,
        autoencoder=autoencoder,
        preprocessing=preprocessing(config),
        class_names=listing.class_names,
    )


def summary(dataset: LatentDataset) -> str:
    manifest = dataset.manifest
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    bad = f", {manifest['quarantined']} quarantined (see quarantine.parquet)" if manifest["quarantined"] else ""
    return f"{len(dataset):,} latents{bad}, {size:.1f} MiB in {dataset.path}"
