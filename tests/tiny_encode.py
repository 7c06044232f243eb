"""Encoding without Ray, for tests of everything but the graph: the same stations, one after the other."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import tiny_recipe

from dit.autoencoder import LatentScale, create_autoencoder, save_autoencoder
from pipelines import encode as job
from pipelines.config.recipe import Recipe
from pipelines.console import Progress, say
from pipelines.latents.dataset import LatentDataset


class Run:
    """A tracking run that remembers."""

    def __init__(self):
        self.told = []

    def metrics(self, metrics, step=0):
        self.told.append((step, metrics))

    def params(self, params):
        pass

    tag = input = lambda self, *args, **kwargs: None


class Context:
    """What the job needs of a StageContext. `kill_after`: raise KeyboardInterrupt after so many shards."""

    def __init__(self, kill_after=None):
        self.kill_after, self.last_run = kill_after, Run()

    @contextmanager
    def run(self, stage, identity):
        yield self.last_run

    def progress(self, stage, *, total, unit, start=0):
        return Progress(stage, total=total, unit=unit, start=start)

    def say(self, stage, text):
        say(stage, text)

    def skipped(self, stage, what):
        say(stage, f"finished already: {what}")


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
    """The job in this process; its graph is a loop."""

    def one_after_the_other(config, context, shards, description):
        read = job.ReadImages(config.images)
        encode = job.EncodeImages(job.autoencoder_of(config).with_absolute_paths(), config.encode)
        write = job.WriteShard(config.latents, description)
        for number, shard in enumerate(shards):
            if number == context.kill_after:
                raise KeyboardInterrupt
            yield json.loads(write(encode(read(shard.task())))["record"])

    monkeypatch.setattr(job, "encode_shards", one_after_the_other)
    return job.encode(config, context=context or Context())
