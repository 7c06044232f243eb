"""Layers of AutoencoderRAE: a frozen vision transformer as the encoder, and another one as the decoder.

Source: Zheng et al. 2025 (arXiv 2510.11690).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dit.autoencoders.kinds import latent_channels, representation_grid
from dit.autoencoders.sizes.layers import Layer, linear, only_parameters, transformer_layer


class EncoderFamily(NamedTuple):
    """How transformers builds a vision transformer of one family by diffusers' AutoencoderRAE."""

    extra_tokens: int
    """Class and register tokens."""
    trained_side: int
    """Side in pixels of the images that the table of positions is for."""
    mlp_width: int | None
    """Width of the MLPs; None for four times the transformer's."""
    layer_vectors: int
    """Vectors of each layer that scale its branches."""
    vectors: int
    """Other vectors: class, register and mask tokens."""


FAMILIES = {
    "dinov2": EncoderFamily(extra_tokens=5, trained_side=518, mlp_width=None, layer_vectors=2, vectors=6),
    "mae": EncoderFamily(extra_tokens=1, trained_side=224, mlp_width=3072, layer_vectors=0, vectors=1),
    "siglip2": EncoderFamily(extra_tokens=0, trained_side=256, mlp_width=3072, layer_vectors=0, vectors=0),
}
"""By encoder_type. The pooling head of siglip2, whose result is not used, is left out."""


def encoder_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Yield the layers of the encoder, which resizes every image to its own size."""
    family, grid, width = FAMILIES[config.get("encoder_type", "dinov2")], representation_grid(config), _width(config)
    tokens = grid.side**2
    yield linear(3 * grid.encoder_patch**2, width, tokens)
    has_class = 1 if family.extra_tokens else 0
    yield only_parameters(width * ((family.trained_side // grid.encoder_patch) ** 2 + has_class + family.vectors))
    for _ in range(config.get("encoder_num_hidden_layers", 12)):
        yield from transformer_layer(width, family.mlp_width or 4 * width, tokens + family.extra_tokens)
        yield only_parameters(family.layer_vectors * width)


def decoder_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Yield the layers of the decoder, which has one more token than the image has patches."""
    grid, width = representation_grid(config), config.get("decoder_hidden_size", 512)
    tokens = grid.side**2
    yield linear(_width(config), width, tokens)
    yield only_parameters(width)
    for _ in range(config.get("decoder_num_hidden_layers", 8)):
        yield from transformer_layer(width, config.get("decoder_intermediate_size", 2048), tokens + 1)
    yield linear(width, 3 * grid.decoder_patch**2, tokens + 1, norm=True)


def _width(config: Mapping[str, Any]) -> int:
    return latent_channels(config)
