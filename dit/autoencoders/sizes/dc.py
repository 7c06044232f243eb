"""Layers of AutoencoderDC, the deep compression autoencoder. Source: Chen et al. 2024 (arXiv 2410.10733)."""

from collections.abc import Iterator, Mapping
from typing import Any

from dit.autoencoders.sizes.layers import Layer, conv, only_parameters

GLU_RATIO = 4
"""Width of the gated convolutions over that of their block."""


def encoder_layers(config: Mapping[str, Any], side: int) -> Iterator[Layer]:
    """Yield the layers of the encoder on an image of `side` x `side` pixels."""
    channels, layers = config["encoder_block_out_channels"], config["encoder_layers_per_block"]
    unshuffle = config.get("downsample_block_type", "pixel_unshuffle") == "pixel_unshuffle"
    if layers[0]:
        yield conv(3, channels[0], side)
    else:
        yield _down(3, channels[1], side, unshuffle)
        side //= 2
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        for _ in range(count):
            yield from _block(config, "encoder", level, width, side)
        if level < len(channels) - 1 and count:
            yield _down(width, channels[level + 1], side, unshuffle)
            side //= 2
    yield conv(channels[-1], config["latent_channels"], side)


def decoder_layers(config: Mapping[str, Any], side: int) -> Iterator[Layer]:
    """Yield the layers of the decoder for an image of `side` x `side` pixels."""
    channels, layers = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
    interpolate = config.get("upsample_block_type", "pixel_shuffle") == "interpolate"
    side //= 2 ** (len(channels) - 1)
    yield conv(config["latent_channels"], channels[-1], side)
    for level, (width, count) in reversed(list(enumerate(zip(channels, layers, strict=True)))):
        if level < len(channels) - 1 and count:
            yield _up(channels[level + 1], width, side, interpolate)
            side *= 2
        for _ in range(count):
            yield from _block(config, "decoder", level, width, side)
    width = channels[0] if layers[0] else channels[1]
    yield only_parameters(2 * width)  # the last norm
    yield conv(width, 3, side) if layers[0] else _up(width, 3, side, interpolate)


def _down(inputs: int, outputs: int, side: int, unshuffle: bool) -> Layer:
    """Return the size of a convolution to half the side. side: of its input."""
    return conv(inputs, outputs // 4, side) if unshuffle else conv(inputs, outputs, side // 2)


def _up(inputs: int, outputs: int, side: int, interpolate: bool) -> Layer:
    """Return the size of a convolution to twice the side. side: of its input."""
    return conv(inputs, outputs, 2 * side) if interpolate else conv(inputs, 4 * outputs, side)


def _block(config: Mapping[str, Any], half: str, level: int, width: int, side: int) -> Iterator[Layer]:
    kinds = config.get(f"{half}_block_types", "ResBlock")
    if (kinds if isinstance(kinds, str) else kinds[level]) == "ResBlock":
        yield conv(width, width, side)
        yield conv(width, width, side, bias=False)
        yield only_parameters(2 * width)
        return
    yield from _attention(width, config.get("attention_head_dim", 32), config[f"{half}_qkv_multiscales"][level], side)
    hidden = GLU_RATIO * width
    yield conv(width, 2 * hidden, side, kernel=1)
    yield conv(2 * hidden, 2 * hidden, side, groups=2 * hidden)
    yield conv(hidden, width, side, kernel=1, bias=False)
    yield only_parameters(2 * width)


def _attention(width: int, head: int, kernels: list[int], side: int) -> Iterator[Layer]:
    """Yield the layers of an attention whose queries, keys and values are also taken after some convolutions."""
    heads, tokens = width // head, side**2
    inner, scales = heads * head, 1 + len(kernels)
    yield conv(width, 3 * inner, side, kernel=1, bias=False)
    for kernel in kernels:
        yield conv(3 * inner, 3 * inner, side, kernel=kernel, bias=False, groups=3 * inner)
        yield conv(3 * inner, 3 * inner, side, kernel=1, bias=False, groups=3 * heads)
    # Linear attention, with one more row of values for the sum of the weights, unless there are few tokens.
    macs = 2 * (head + 1) * head * tokens if tokens > head else 2 * tokens**2 * head
    yield Layer(scales * heads * macs, 0, scales * inner * tokens)
    yield conv(scales * inner, width, side, kernel=1, bias=False)
    yield only_parameters(2 * width)
