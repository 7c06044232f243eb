"""Encoding images into moments: the three steps of a shard, and what identifies their result."""

import hashlib
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from pipelines.config.recipe import EncodeConfig, ImagesConfig, Recipe
from pipelines.images.listing import Listing
from pipelines.images.preprocess import read_cropped
from pipelines.latents import schema
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.dataset import channel_sums
from pipelines.latents.shards import shard_name, write_shard


def bytes_in_flight(config: Recipe, description: dict) -> int:
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
        images, good, errors = read_cropped(self.images, row["keys"], row.get("locations"))
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
        data = schema.parquet_bytes(table)
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


def describe_latents(config: Recipe, listing: Listing, autoencoder: dict) -> dict:
    """What the latents say of themselves."""
    side = config.images.size // autoencoder["downsample"]
    return schema.describe(
        moments_shape=(2 * autoencoder["latent_channels"], side, side),
        flip=config.encode.flip,
        autoencoder=autoencoder,
        preprocessing=preprocessing(config),
        class_names=listing.class_names,
    )
