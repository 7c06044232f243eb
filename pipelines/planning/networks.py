"""The networks of a recipe by their shapes and sizes, without loading or downloading any."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit import autoencoder_size
from dit.autoencoder_size import AutoencoderSize
from dit.config import DiTConfig, UViTConfig
from pipelines.config.recipe import AutoencoderConfig, Recipe
from pipelines.latents import schema
from raydit.errors import NotFound


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The transformer of a recipe, and the two halves of its autoencoder."""

    model: DiTConfig | UViTConfig
    encoder: AutoencoderSize
    decoder: AutoencoderSize

    def moments_bytes(self, flip: bool) -> int:
        """Return the bytes of one image's moments. flip: whether those of its horizontal flip are stored as well."""
        height, width = self.model.latent_size
        numbers = 2 * self.model.in_channels * height * width * (1 + flip)
        return numbers * np.dtype(schema.MOMENTS_DTYPE).itemsize


def resolve_networks(config: Recipe, num_classes: int) -> Networks:
    """Return the networks of a recipe. Raises NotFound for an autoencoder that this machine knows nothing of."""
    autoencoder, side = autoencoder_config(config.autoencoder), config.images.size
    model = config.model.resolve(
        input_size=side // autoencoder_size.downsample(autoencoder),
        in_channels=autoencoder["latent_channels"],
        num_classes=num_classes,
        learn_sigma=config.objective.learn_sigma,
    )
    return Networks(
        model=replace(model, gradient_checkpointing=config.train.gradient_checkpointing),
        encoder=autoencoder_size.encoder_size(autoencoder, side),
        decoder=autoencoder_size.decoder_size(autoencoder, side),
    )


def autoencoder_config(autoencoder: AutoencoderConfig) -> dict[str, Any]:
    """Return the diffusers config of an autoencoder. Raises NotFound where it would have to be downloaded."""
    id, train = autoencoder.id, autoencoder.train
    if train is not None:
        return autoencoder_size.own_config(
            latent_channels=train.latent_channels, downsample=train.downsample, width=train.width
        )
    assert id is not None, "a recipe has an autoencoder's id, or settings to train one"
    if (Path(id) / "config.json").is_file():
        return json.loads((Path(id) / "config.json").read_text())
    if id in autoencoder_size.STABLE_DIFFUSION:
        return autoencoder_size.STABLE_DIFFUSION_CONFIG
    if cached := _cached_config(id):
        return cached
    raise NotFound(
        f"autoencoder.id: found {id!r}, which is not on this machine, so that its size is unknown",
        f"a diffusers folder, a hub id that is cached, or one of {', '.join(autoencoder_size.STABLE_DIFFUSION)}",
        "Download it first",
    )


def _cached_config(id: str) -> dict[str, Any] | None:
    """Return the config.json of a hub id from the local cache, or None if it was never downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(id, "config.json")
    except HFValidationError:  # the path of a folder that does not exist
        return None
    return json.loads(Path(file).read_text()) if isinstance(file, str) else None
