"""Multiply-accumulates, parameters and feature maps of diffusers' autoencoders, computed from their configs.

Imports no torch. A config is the content of config.json in a diffusers folder. The arithmetic of convolutions and
attention counts, that of norms does not.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dit.autoencoders.kinds import class_of, downsample
from dit.autoencoders.sizes import dc, rae
from dit.autoencoders.sizes.layers import Layer, conv
from raydit.errors import InvalidInput
from raydit.lfs import refuse_lfs_pointer_file

STABLE_DIFFUSION = ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse")
"""Hub ids of the autoencoders of most published weights, which share their scale and their encoder."""
STABLE_DIFFUSION_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Config of Stable Diffusion's autoencoders, for use when they are not on this machine."""

MAX_SIZE, MAX_LEVELS, MAX_LAYERS = 1 << 16, 64, 256
"""Largest number in the config of an autoencoder, and most channels; most levels; most layers in a level."""
LAYER_FIELDS = (
    "layers_per_block",
    "num_encoder_blocks",
    "num_decoder_blocks",
    "encoder_layers_per_block",
    "decoder_layers_per_block",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises FileNotFoundError, and InvalidInput if it is a Git LFS pointer or no config."""
    file = folder / "config.json"
    refuse_lfs_pointer_file(file, "the autoencoder's config")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file}: found no JSON ({error})", "the autoencoder's config", "copy it again") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{file}: found a {type(config).__name__}", "the autoencoder's config", "copy it again")
    for field, value in config.items():
        _check_size(file, field, value)
    return config


def _check_size(file: Path, field: str, value: Any) -> None:
    """Raise InvalidInput for a list or a number in a config that no autoencoder has: it would be allocated."""
    if isinstance(value, list):
        most = MAX_SIZE if field.startswith("latents_") else MAX_LEVELS
        if len(value) > most:
            raise InvalidInput(f"{file}: {field}: found {len(value):,} values", f"at most {most:,}", "copy it again")
        for each in value:
            _check_size(file, field, each)
    elif isinstance(value, int | float):
        most = MAX_LAYERS if field in LAYER_FIELDS else MAX_SIZE
        if not abs(value) <= most:
            raise InvalidInput(f"{file}: {field}: found {value:.6g}", f"at most {most:,}", "copy it again")


class AutoencoderSize(NamedTuple):
    """Size of an encoder or a decoder on one image."""

    macs: int
    """Multiply-accumulates."""
    parameters: int
    """Number of parameters."""
    largest: int
    """Number of elements of the largest feature map."""
    elements: int
    """Number of elements of all feature maps, one per layer."""


def encoder_size(config: Mapping[str, Any], side: int) -> AutoencoderSize:
    """Return the size of the encoder on an image of `side` x `side` pixels."""
    layers: dict[str, Callable[[], Iterator[Layer]]] = {
        "AutoencoderTiny": lambda: _tiny_encoder(config, side),
        "AutoencoderDC": lambda: dc.encoder_layers(config, side),
        "AutoencoderRAE": lambda: rae.encoder_layers(config),
    }
    return _sum(layers.get(class_of(config), lambda: _kl_encoder(config, side))())


def decoder_size(config: Mapping[str, Any], side: int) -> AutoencoderSize:
    """Return the size of the decoder for an image of `side` x `side` pixels."""
    layers: dict[str, Callable[[], Iterator[Layer]]] = {
        "AutoencoderTiny": lambda: _tiny_decoder(config, side),
        "AutoencoderDC": lambda: dc.decoder_layers(config, side),
        "AutoencoderRAE": lambda: rae.decoder_layers(config),
    }
    return _sum(layers.get(class_of(config), lambda: _kl_decoder(config, side))())


def own_config(*, latent_channels: int, downsample: int, width: int) -> dict[str, Any]:
    """Return the fields of the config of `dit.autoencoder.create_autoencoder` that its size depends on."""
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (width,) + (2 * width,) * (downsample.bit_length() - 1),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "mid_block_add_attention": False,
    }


def _sum(layers: Iterator[Layer]) -> AutoencoderSize:
    every = list(layers)
    macs, parameters, elements = (sum(values) for values in zip(*every, strict=True))
    return AutoencoderSize(macs, parameters, max(layer.elements for layer in every), elements)


def _resnet(inputs: int, outputs: int, side: int) -> Iterator[Layer]:
    yield conv(inputs, outputs, side, norm=True)
    yield conv(outputs, outputs, side, norm=True)
    if inputs != outputs:
        yield conv(inputs, outputs, side, kernel=1)


def _middle(config: Mapping[str, Any], channels: int, side: int) -> Iterator[Layer]:
    yield from _resnet(channels, channels, side)
    if config.get("mid_block_add_attention", True):
        tokens = side**2
        macs = 4 * tokens * channels**2 + 2 * tokens**2 * channels
        yield Layer(macs, 4 * (channels**2 + channels) + 2 * channels, 4 * tokens * channels)
    yield from _resnet(channels, channels, side)


def _kl_encoder(config: Mapping[str, Any], side: int) -> Iterator[Layer]:
    channels, latents = list(config["block_out_channels"]), config["latent_channels"]
    yield conv(3, channels[0], side)
    for level, (inputs, outputs) in enumerate(pairwise([channels[0], *channels])):
        for number in range(config["layers_per_block"]):
            yield from _resnet(inputs if number == 0 else outputs, outputs, side)
        if level < len(channels) - 1:
            side //= 2
            yield conv(outputs, outputs, side)
    yield from _middle(config, channels[-1], side)
    yield conv(channels[-1], 2 * latents, side, norm=True)
    if config.get("use_quant_conv", True):
        yield conv(2 * latents, 2 * latents, side, kernel=1)


def _kl_decoder(config: Mapping[str, Any], side: int) -> Iterator[Layer]:
    given = config.get("decoder_block_out_channels") or config["block_out_channels"]
    channels, latents = list(reversed(given)), config["latent_channels"]
    side //= downsample(config)
    if config.get("use_post_quant_conv", True):
        yield conv(latents, latents, side, kernel=1)
    yield conv(latents, channels[0], side)
    yield from _middle(config, channels[0], side)
    for level, (inputs, outputs) in enumerate(pairwise([channels[0], *channels])):
        for number in range(config["layers_per_block"] + 1):
            yield from _resnet(inputs if number == 0 else outputs, outputs, side)
        if level < len(channels) - 1:
            side *= 2
            yield conv(outputs, outputs, side)
    yield conv(channels[-1], 3, side, norm=True)


def _tiny_block(channels: int, side: int) -> Iterator[Layer]:
    yield from (conv(channels, channels, side) for _ in range(3))


def _tiny_encoder(config: Mapping[str, Any], side: int) -> Iterator[Layer]:
    channels = config["encoder_block_out_channels"]
    for level, (width, blocks) in enumerate(zip(channels, config["num_encoder_blocks"], strict=True)):
        if level == 0:
            yield conv(3, width, side)
        else:
            side //= 2
            yield conv(width, width, side, bias=False)
        for _ in range(blocks):
            yield from _tiny_block(width, side)
    yield conv(channels[-1], config["latent_channels"], side)


def _tiny_decoder(config: Mapping[str, Any], side: int) -> Iterator[Layer]:
    channels, blocks = config["decoder_block_out_channels"], config["num_decoder_blocks"]
    side //= downsample(config)
    yield conv(config["latent_channels"], channels[0], side)
    for level, (width, number) in enumerate(zip(channels, blocks, strict=True)):
        for _ in range(number):
            yield from _tiny_block(width, side)
        last = level == len(channels) - 1
        side *= 1 if last else 2
        yield conv(width, 3 if last else width, side, bias=last)
