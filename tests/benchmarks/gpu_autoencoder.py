"""An autoencoder of Stable Diffusion's size with random weights, so that nothing has to be downloaded."""

from typing import Any

import diffusers
import torch

from dit.autoencoders.size import STABLE_DIFFUSION_CONFIG


def stable_diffusion_settings(small: bool) -> dict[str, Any]:
    """Return the fields of Stable Diffusion's autoencoder; narrow ones for a rehearsal."""
    return STABLE_DIFFUSION_CONFIG | ({"block_out_channels": [32, 32, 32, 32]} if small else {})


def create_stable_diffusion_autoencoder(settings: dict[str, Any]) -> diffusers.AutoencoderKL:
    """Return an autoencoder on the CPU; the seed of its weights is fixed."""
    levels = len(settings["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    fields = {name: value for name, value in settings.items() if name != "_class_name"}
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**fields, **kinds)
