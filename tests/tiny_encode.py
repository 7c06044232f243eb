"""Encode without Ray, for tests of everything but the graph: the same steps, one after the other."""

import json
from pathlib import Path

import numpy as np
import torch
from fakes import FakeContext
from PIL import Image
from tiny import tiny_recipe

from dit.autoencoder import LatentScale, create_autoencoder, save_autoencoder
from pipelines import encode as job
from pipelines.config.recipe import Recipe
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.records import ShardRecord

NEW = ("blob/000a.png", "ring/011a.png", "stripe/zzz.png")
"""Images to add, which sort before, between and after the existing images."""


class Context(FakeContext):
    """A context without Ray. `kill_after`: raise KeyboardInterrupt after this number of shards."""

    def __init__(self, kill_after=None):
        super().__init__()
        self.kill_after = kill_after

    def prepare_work(self, workers, stage):
        """Find room for any workers: earlier latents are moved away only once there is some."""


def autoencoder_folder(folder: Path) -> Path:
    """An untrained autoencoder as a diffusers folder, the same in every call."""
    if not folder.exists():
        torch.manual_seed(0)
        module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
        save_autoencoder(module, folder, LatentScale((0.0,) * 4, (1.0,) * 4))
    return folder


def recipe(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe with an autoencoder that needs no training, and everything in `folder`."""
    id = autoencoder_folder(folder / "pretrained")
    config = tiny_recipe(folder, "images.held_out=0.0", *overrides)
    autoencoder = type(config.autoencoder)(id=str(id))
    return type(config)(**{**vars(config), "autoencoder": autoencoder})


def encode_here(config: Recipe, monkeypatch, context: Context | None = None) -> LatentDataset:
    """Run the job in this process, with a loop instead of its graph."""

    def encode_shards(context, shards, images, autoencoder, recorded, settings, write):
        read = job.ReadImages(images, write.shared)
        encode = job.EncodeImages(autoencoder.with_absolute_paths(), settings, recorded)
        for number, shard in enumerate(shards):
            if number == context.kill_after:
                raise KeyboardInterrupt
            yield ShardRecord.from_json(json.loads(write(encode(read(shard.task())))["record"]))

    monkeypatch.setattr(job, "encode_shards", encode_shards)
    return job.encode(config, context=context or Context())


def add_images(folder, names=NEW, seed=1):
    rng = np.random.default_rng(seed)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (17, 19, 3), dtype=np.uint8)).save(folder / "images" / name)


def rows_by_key(dataset: LatentDataset) -> dict[str, tuple]:
    """Return label and moments by key."""
    tables = [table.to_pylist() for table in dataset.tables()]
    return {row["key"]: (row["label"], row["moments"]) for table in tables for row in table}
