"""Random numbers as functions of (seed, stream, step, position), for whole batches at once and on any device.

There is no generator and no state: a number is a hash (Philox4x32-10) of its own address, in integer arithmetic that is
the same on all devices (`dit.philox`). Uniform numbers are therefore equal to the bit everywhere, compiled or not.
Normal ones are equal to the bit on one kind of device, whatever the batch; between kinds, and between eager and
compiled, to rounding.
"""

import math
import operator
from collections.abc import Callable, Sequence
from enum import IntEnum
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from dit.philox import MASK, Key, philox4x32, philox4x32_numpy
from raydit.errors import InvalidInput


class Stream(IntEnum):
    """What a random number is for; numbers of different streams are independent.

    A stream's number is fixed forever, because what was trained or sampled depends on it. A new use gets a new number,
    and the number of a use that has ended is not given again.
    """

    POSTERIOR_NOISE = 0
    """Normal, of a latent's shape: the draw from the posterior in diffusion training."""
    NOISE = 1
    """Normal, of a latent's shape: the noise that diffusion or flow training adds."""
    TIMESTEP = 2
    """Uniform, one for each image: its timestep in training."""
    CONDITION_DROPOUT = 3
    """Uniform, one for each image: whether all its conditions are dropped in training."""
    FLIP = 4
    """Uniform, one for each image: whether it is flipped horizontally in training."""
    AUTOENCODER_NOISE = 5
    """Normal, of a latent's shape: the draw from the posterior in autoencoder training."""
    START_NOISE = 6
    """Normal, of a latent's shape, at step 0: the noise that a sample starts from."""
    STEP_NOISE = 7
    """Normal, of a latent's shape: the noise of a sampler's step."""
    VALIDATION_NOISE = 8
    """Normal, of a latent's shape: the noise that is added for the validation loss."""
    VALIDATION_TIMESTEP = 9
    """Uniform, one for each image: its timestep in the validation loss."""
    VALIDATION_POSTERIOR_NOISE = 10
    """Normal, of a latent's shape: the draw from the posterior for the validation loss."""
    AUTOENCODER_CROP = 11
    """Uniform, two for each image: top and left side of its random crop in autoencoder training."""


MAX_ELEMENTS = 4 * 2**32
"""Most numbers at one position: a word of the counter counts them in blocks of four."""
CPU_BLOCKS, DEVICE_BLOCKS = 2**15, 2**22
"""Blocks that are computed at a time: on a CPU as many as fit its caches; on a GPU, 0.5 GB."""
LARGEST = 1 - 2.0**-24
"""The largest float32 below 1."""


def uniform(
    seed: int,
    stream: int | Sequence[int],
    step: int | Sequence[int],
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw uniform numbers in (0, 1), float32: `shape` at one position, (N, *shape) at a tensor of N positions.

    seed: in [0, 2^64). stream: of `Stream`; with several, their draws, (S, [N,] *shape), cost little more than one.
    step: of training or sampling, in [0, 2^32); 0 where there are none. With several, their draws, ([S,] K, [N,]
    *shape), are those of each alone.
    position: the index in the global batch, or the sample's index, in [0, 2^32); an integer, or integers (N,) on any
    device. The draw at a position depends neither on the other positions nor on what follows an element in C order.
    Each number is (x + 0.5) / 2^32 of a random word x, rounded to float32; where that would give 1, which happens once
    in 2^25 draws, it is the largest float32 below 1. So log(u), log(1 - u) and the index floor(u n) < n are safe.
    Code for torch.compile must get its positions as a tensor argument: where all of the address is made in the compiled
    code, Inductor follows every use of every word, and takes minutes.
    Raises InvalidInput for values out of range; positions on a GPU, or in compiled code, are not checked.
    """
    return _draw(seed, stream, step, position, shape, device, lambda u, v: (u, v))


def normal(
    seed: int,
    stream: int | Sequence[int],
    step: int | Sequence[int],
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normal numbers, float32: `shape` at one position, (N, *shape) at a tensor of N positions.

    Arguments and errors are those of `uniform`. From the uniform numbers u, v of words (0, 1), and of words (2, 3), it
    takes r cos(2 pi v) and r sin(2 pi v), r = sqrt(-2 log u), in float32. No number lies beyond sqrt(66 log 2) = 6.76.
    Source: Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    return _draw(seed, stream, step, position, shape, device, _box_muller)


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return radius * angle.cos(), radius * angle.sin()


def _draw(
    seed: int,
    stream: int | Sequence[int],
    step: int | Sequence[int],
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str,
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Draw pairs of uniform numbers, transform them, and arrange the results by stream, position and element.

    transform: takes the numbers of words (0, 2), and those of words (1, 3), each (2, S, K, N, B) for S streams, K
    steps, N positions and B blocks. Element e in C order is that of word e mod 4 and block e // 4.
    """
    streams, steps = (tuple(many) if isinstance(many, Sequence) else (many,) for many in (stream, step))
    _check_range("seed", seed, 64)
    for number in streams:
        _check_range("stream", number, 32)
    for number in steps:
        _check_range("step", number, 32)
    positions, num_elements = _as_positions(position), _count_elements(shape)
    # Compiled code is made for one seed, as one of 2^63 or more would not fit its integer arguments.
    seed = operator.index(seed)
    key = (seed & MASK, seed >> 32)
    num_blocks, compiling = -(-num_elements // 4), torch.compiler.is_compiling()
    on_cpu = torch.device(device).type == "cpu" and not compiling
    # Compiled code keeps no intermediate results, and needs no parts.
    at_once = (CPU_BLOCKS if on_cpu else DEVICE_BLOCKS) // max(1, num_blocks * len(streams) * len(steps))
    parts = []
    for some in (positions,) if compiling else positions.split(max(1, at_once)):
        if on_cpu:
            pairs = _pairs_on_cpu(num_blocks, some.numpy(force=True), steps, streams, key)
        else:
            pairs = _pairs_on_device(num_blocks, some.to(device), steps, streams, key)
        (a, c), (b, d) = transform(*pairs)
        parts.append(torch.stack((a, b, c, d), dim=-1).flatten(-2)[..., :num_elements])
    flat = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
    axes = [len(many) for many, given in ((streams, stream), (steps, step)) if isinstance(given, Sequence)]
    axes += [len(positions)] * isinstance(position, Tensor)
    return flat.reshape((*axes, *shape)).contiguous()


def _pairs_on_device(
    num_blocks: int, positions: Tensor, steps: tuple[int, ...], streams: tuple[int, ...], key: Key
) -> tuple[Tensor, Tensor]:
    """Return uniform numbers for `transform`, by torch. positions: (N,), on the device."""
    device = positions.device
    # Filled rather than embedded as constants: compiled code then serves every step.
    third = torch.stack([torch.full((1, 1), number, dtype=torch.int64, device=device) for number in steps])
    fourth = torch.stack([torch.full((1, 1, 1), number, dtype=torch.int64, device=device) for number in streams])
    a, b, c, d = philox4x32((torch.arange(num_blocks, device=device), positions[:, None], third, fourth), key)
    # 2 x + 1 is an integer and 2^-33 a power of two, so that the only rounding is the conversion's, to nearest.
    u, v = (((2 * torch.stack(words) + 1).float() * 2.0**-33).clamp(max=LARGEST) for words in ((a, c), (b, d)))
    return u, v


def _pairs_on_cpu(
    num_blocks: int, positions: np.ndarray, steps: tuple[int, ...], streams: tuple[int, ...], key: Key
) -> tuple[Tensor, Tensor]:
    """Return uniform numbers for `transform`, by NumPy. positions: int64 (N,)."""
    third, fourth = np.array(steps)[:, None, None], np.array(streams)[:, None, None, None]
    words = philox4x32_numpy((np.arange(num_blocks), positions[:, None], third, fourth), key)
    # x + 0.5 is exact in float64, so that the only rounding is to float32.
    u, v = (np.minimum(((words[first::2] + 0.5) * 2.0**-32).astype(np.float32), LARGEST) for first in (0, 1))
    return torch.from_numpy(u), torch.from_numpy(v)


def _as_positions(position: int | Tensor) -> Tensor:
    """Return positions as int64 (N,). Raises InvalidInput if they are something else, or on a CPU, out of range."""
    if not isinstance(position, Tensor):
        _check_range("position", position, 32)
        return torch.full((1,), position, dtype=torch.int64)
    is_integer = not (position.is_floating_point() or position.is_complex() or position.dtype == torch.bool)
    if position.ndim != 1 or not is_integer:
        found = f"positions are {position.dtype} of shape {tuple(position.shape)}"
        raise InvalidInput(found, "integers of shape (N,)", "give one integer for each image")
    positions = position.long()
    if positions.device.type == "cpu" and len(positions) and not torch.compiler.is_compiling():
        for end in positions.aminmax():
            _check_range("position", int(end), 32)
    return positions


def _count_elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape. Raises InvalidInput if a side is negative, or there are too many."""
    num_elements = math.prod(shape)
    if min(shape, default=0) < 0 or num_elements > MAX_ELEMENTS:
        found = f"shape is {tuple(shape)}"
        raise InvalidInput(found, "no negative side and at most 2^34 elements", "draw less at each position")
    return num_elements


def _check_range(name: str, value: int, bits: int) -> None:
    if not isinstance(value, Integral) or not 0 <= value < 2**bits:
        raise InvalidInput(f"{name} is {value!r}", f"an integer in [0, 2^{bits})", f"choose another {name}")
