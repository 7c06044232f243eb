"""Sizes of the layers that autoencoders are built of: multiply-accumulates, parameters and elements on one image.

Imports no torch. The arithmetic of convolutions, linear layers and attention counts, that of norms does not.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Layer(NamedTuple):
    """Size of one convolution, linear or attention layer on one image."""

    macs: int
    """Multiply-accumulates."""
    parameters: int
    """Number of parameters, including those of the preceding norm."""
    elements: int
    """Number of elements of the output."""


def conv(
    inputs: int, outputs: int, side: int, kernel: int = 3, *, norm: bool = False, bias: bool = True, groups: int = 1
) -> Layer:
    """Return the size of a convolution; side: of its output. norm: whether a norm precedes it, with weight and bias."""
    weights = inputs // groups * outputs * kernel**2
    parameters = weights + (outputs if bias else 0) + (2 * inputs if norm else 0)
    return Layer(weights * side**2, parameters, outputs * side**2)


def linear(inputs: int, outputs: int, tokens: int, *, norm: bool = False) -> Layer:
    """Return the size of a linear layer with bias on each token. norm: whether a norm precedes it."""
    return Layer(inputs * outputs * tokens, inputs * outputs + outputs + (2 * inputs if norm else 0), outputs * tokens)


def transformer_layer(width: int, hidden: int, tokens: int) -> Iterator[Layer]:
    """Yield the layers of one layer of a vision transformer. hidden: width of its MLP."""
    qkv = linear(width, 3 * width, tokens, norm=True)
    yield qkv._replace(macs=qkv.macs + 2 * tokens**2 * width)
    yield linear(width, width, tokens)
    yield linear(width, hidden, tokens, norm=True)
    yield linear(hidden, width, tokens)


def only_parameters(count: int) -> Layer:
    """Return a layer of parameters that nothing is multiplied by: tables, tokens and the last norm."""
    return Layer(0, count, 0)
