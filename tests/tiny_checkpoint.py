"""Checkpoints of the tiny recipe with random weights, with images and an autoencoder: all that evaluation needs."""

from pathlib import Path

import torch
from tiny import tiny_recipe

from dit.autoencoder import LatentScale, create_autoencoder, describe_autoencoder, save_autoencoder
from dit.checkpoint import Checkpoint, save_checkpoint
from dit.config import DiTConfig
from dit.files import write_json
from dit.formats.completion import step_name
from dit.formats.record import describe_checkpoint
from dit.model import DiT
from dit.train import create_state
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.latents.autoencoder import AUTOENCODER_RECORD, TRAINED_AUTOENCODER

MODEL = DiTConfig(
    input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2, in_channels=4, num_classes=3, learn_sigma=False
)


def tiny_output(folder: Path, *overrides: str, size: int = 16) -> Recipe:
    """Write an autoencoder that halves the sides of images of `size` pixels, and return the recipe of the folder."""
    config = tiny_recipe(folder, *overrides)
    torch.manual_seed(0)
    autoencoder = create_autoencoder(image_size=size, latent_channels=4, downsample=2, width=8)
    save_autoencoder(autoencoder, Path(config.folder(TRAINED_AUTOENCODER)), LatentScale((0.0,) * 4, (1.0,) * 4))
    write_json(Path(config.folder(TRAINED_AUTOENCODER)) / AUTOENCODER_RECORD, {"psnr": 0.0, "psnr_images": "none"})
    return config


def random_network(seed: int, model: DiTConfig = MODEL) -> DiT:
    """Return a network with random weights, but for its positions: as initialised it would sample noise only."""
    torch.manual_seed(seed)
    network = DiT(model)
    for name, weight in network.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(weight, std=0.2)
    return network


def write_checkpoint(
    config: Recipe, step: int, model: DiTConfig = MODEL, latents_fingerprint: str | None = None
) -> Checkpoint:
    """Write a finished checkpoint for a step of the recipe's training; every step has other weights."""
    state = create_state(random_network(step, model), config.train)
    state.step = step
    described = describe_checkpoint(
        model=model,
        objective={"kind": "flow"},
        autoencoder={"id": TRAINED_AUTOENCODER, **describe_autoencoder(Path(config.folder(TRAINED_AUTOENCODER)))},
        class_names=("blob", "ring", "stripe"),
        seed=config.seed,
        latents_fingerprint=latents_fingerprint,
        recipe=resolved(config),
    )
    folder = Path(config.folder("checkpoints")) / step_name(step)
    return save_checkpoint(state, folder, described, {"seed": config.seed})
