"""A tiny recipe with finished latents, and its training in this process or on Ray."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encode import autoencoder_folder
from tiny_latents import make_record

from cluster import storage
from dit.autoencoder import describe_autoencoder
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.reader import validate_recipe
from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset, write_manifest
from pipelines.latents.schema import LatentDescription
from pipelines.training.group.messages import Notice, Report, Saved
from pipelines.training.group.worker import Worker
from pipelines.training.loop import train_worker
from pipelines.training.settings import train_worker_settings
from pipelines.training.starting.find_start import find_start
from pipelines.training.starting.training_start import starting_from, with_recorded_start, write_first_checkpoint

ROWS, SHARD_ROWS = 48, 6


def training_recipe(
    folder, output=None, model=None, encode=None, latent_side=4, random=None, objective="flow", **train
):
    """Return a recipe; the first call for a folder writes its autoencoder and latents. train: settings of [train]."""
    if not (folder / "autoencoder").exists():
        autoencoder_folder(folder / "autoencoder")
    recipe = validate_recipe(
        {
            "name": "training",
            "output": str(output or folder / "output"),
            "seed": 3,
            "random": random,
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
            "images": {"path": "digits", "size": 16},
            "autoencoder": {"id": str(folder / "autoencoder")},
            "model": model or {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2},
            "encode": encode or {},
            "objective": {"kind": objective},
            "evaluate": {"sampler": "euler" if objective == "flow" else "ddpm", "sampling_steps": 2, "batch_size": 8},
            "train": {
                "steps": 8,
                "global_batch_size": 8,
                "learning_rate": 1e-3,
                "checkpoint_every": 3,
                "log_every": 1,
                "ema_decay": 0.9,
                **train,
            },
        }
    )
    if not storage.exists(recipe.latents):
        write_latents(recipe, latent_side=latent_side)
    return recipe


def write_held_out(recipe, num_rows):
    """Write random held-out latents of the same classes."""
    return write_latents(recipe, path=recipe.latents_held_out, num_rows=num_rows, seed=1)


def write_latents(recipe, poisoned=(), latent_side=4, path=None, num_rows=ROWS, seed=0):
    """Write random latents of three classes; poisoned rows are not finite. path: that of the training's by default."""
    path = path or recipe.latents
    shape = (8, latent_side, latent_side)
    autoencoder = {"id": recipe.autoencoder.id, **describe_autoencoder(Path(recipe.autoencoder.id))}
    description = LatentDescription(
        moments_shape=shape,
        flip=True,
        autoencoder=autoencoder,
        preprocessing={"size": 16, "crop": "adm"},
        class_names=("a", "b", "c"),
    )
    rng, records = np.random.default_rng(seed), []
    for index, first in enumerate(range(0, num_rows, SHARD_ROWS)):
        rows = np.arange(first, min(first + SHARD_ROWS, num_rows))
        moments = rng.normal(size=(len(rows), *shape)).astype("<f2")
        finite = moments.copy()
        for row in set(poisoned) & set(rows.tolist()):
            moments[row - first, 0] = np.nan
        keys, labels = [f"image-{row}" for row in rows], (rows - first) % 3
        table = schema.shard_table(schema.latent_schema(description), keys, labels, moments, moments[..., ::-1])
        data, name = schema.parquet_bytes(table), f"part-{index:05d}.parquet"
        storage.write_atomically(storage.join(path, name), data)
        records.append(make_record(index, finite, data))
    return write_manifest(path, description, {"seed": 0}, records, recipe={})


def settings_of_worker(recipe):
    """Return the settings of every worker as the train job works them out, for a training without a start."""
    held_out = LatentDataset.open(recipe.latents_held_out) if recipe.train.validate_every else None
    return train_worker_settings(recipe, LatentDataset.open(recipe.latents), held_out)


class Training:
    """The training of one process: the messages that it sent, and the checkpoints that it wrote."""

    def __init__(self, recipe):
        self.recipe, self.messages = recipe, []

    def run(self, stop_after=None):
        """Train; stop_after: the number of steps after which a signal is there."""
        latents = LatentDataset.open(self.recipe.latents)
        settings, start = settings_of_worker(self.recipe), find_start(self.recipe)
        if start is not None:
            settings = with_recorded_start(starting_from(settings, start, latents), settings.checkpoints)
            if not settings.checkpoints.has_any():
                settings, self.started = write_first_checkpoint(start, settings)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            counted = itertools.count(1)
            asked = (lambda: next(counted) >= stop_after) if stop_after else lambda: False
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("pipelines.training.group.stop.EXCHANGE_SECONDS", 0.0)  # after every step
                train_worker(Worker(0, 1, torch.device("cpu"), self.messages.append, asked), settings)
        finally:
            torch.set_num_threads(threads)
        return self

    @property
    def losses(self):
        return {message.step: message.metrics["loss"] for message in self.messages if isinstance(message, Report)}

    @property
    def notices(self):
        return [message.text for message in self.messages if isinstance(message, Notice)]

    @property
    def saved(self):
        return [message.step for message in self.messages if isinstance(message, Saved) and not message.interrupted]

    @property
    def interrupted(self):
        return [message.step for message in self.messages if isinstance(message, Saved) and message.interrupted]

    @property
    def weights(self):
        return final_weights(self.recipe)


def final_weights(recipe):
    """Return every tensor of the newest checkpoint by name: weights, averages, optimizer."""
    newest = CheckpointFolder(recipe.folder("checkpoints")).newest()
    return {
        f"{newest.step}/{file.stem}/{name}": tensor
        for file in sorted(newest.path.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal(found, expected):
    """Assert that tensors, given by name, are equal to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
