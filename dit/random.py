"""Random numbers as functions of (seed, stream, step, position), for whole batches at once and on any device.

There is no generator and no state: a number is a hash of its own address, Philox4x32-10, in integer arithmetic that all
devices do alike. Uniform numbers are therefore equal to the bit everywhere, compiled or not. Normal ones are equal to
the bit on one kind of device, whatever the batch; between kinds, and between eager and compiled, to rounding.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (https://doi.org/10.1145/2063384.2063405).
"""

import math
import operator
from collections.abc import Sequence
from enum import IntEnum
from numbers import Integral

import torch
from torch import Tensor

from raydit.errors import InvalidInput


class Stream(IntEnum):
    """What a random number is for; numbers of different streams are independent.

    A stream's number is fixed for ever, because what was trained or sampled depends on it. A new use gets a new number,
    and the number of a use that has ended is not given again.
    """

    POSTERIOR_NOISE = 0
    """Normal, of a latent's shape: the draw from the posterior in diffusion training."""
    NOISE = 1
    """Normal, of a latent's shape: the noise that diffusion or flow training adds."""
    TIMESTEP = 2
    """Uniform, one for each image: its timestep in training."""
    LABEL_DROPOUT = 3
    """Uniform, one for each image: whether its label, or all its conditions, are dropped in training."""
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


MASK = 0xFFFFFFFF
"""The 32 bits of a word. Words are int64 tensors in [0, 2^32), because torch hardly computes with unsigned integers."""
MULTIPLIERS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
"""Philox's two multipliers, less 2^32 (see `_multiply`)."""
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
"""What each round adds to the two words of the key."""
NUM_ROUNDS = 10
MAX_ELEMENTS = 4 * 2**32
"""Most numbers at one position: a word of the counter counts them in blocks of four."""
CPU_BLOCKS, DEVICE_BLOCKS = 2**15, 2**22
"""Blocks that are computed at a time. On a CPU as many as fit its caches, and as torch computes on one thread: there
are 150 operations, and threads that wait for each other at each would wait long beside other work. On a GPU, 0.5 GB."""


def uniform(
    seed: int,
    stream: int,
    step: int,
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw uniform numbers in (0, 1), float32: `shape` at one position, (N, *shape) at a tensor of N positions.

    seed: in [0, 2^64). stream: of `Stream`. step: of training or sampling, in [0, 2^32); 0 where there are none.
    position: the index in the global batch, or the sample's index, in [0, 2^32); an integer, or integers (N,) on any
    device. The draw at a position depends neither on the other positions nor on what follows an element in C order.
    Each number is (x + 0.5) / 2^32 of a random word x, rounded to float32; where that would give 1, which happens once
    in 2^25 draws, it is the largest float32 below 1. So log(u), log(1 - u) and the index floor(u n) < n are safe.
    Code for torch.compile must get its positions as a tensor argument: where all of the address is made in the compiled
    code, Inductor follows every use of every word, and takes minutes.
    Raises InvalidInput for values out of range; positions on a GPU, or in compiled code, are not checked.
    """
    return _in_order(_draw(seed, stream, step, position, shape, device), position, shape)


def normal(
    seed: int,
    stream: int,
    step: int,
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normal numbers, float32: `shape` at one position, (N, *shape) at a tensor of N positions.

    Arguments and errors are those of `uniform`. From the uniform numbers u, v of words (0, 1), and of words (2, 3), it
    takes r cos(2 pi v) and r sin(2 pi v), r = sqrt(-2 log u), in float32. No number lies beyond sqrt(66 log 2) = 6.76.
    Source: Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    numbers = _draw(seed, stream, step, position, shape, device)
    normals = []
    for u, v in (numbers[:2], numbers[2:]):
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        normals += [radius * angle.cos(), radius * angle.sin()]
    return _in_order(normals, position, shape)


def _draw(
    seed: int, stream: int, step: int, position: int | Tensor, shape: Sequence[int], device: torch.device | str
) -> list[Tensor]:
    """Return uniform numbers of each of the four words: (N, B), for N positions and the B blocks that `shape` needs."""
    _check_range("seed", seed, 64)
    _check_range("stream", stream, 32)
    _check_range("step", step, 32)
    blocks = torch.arange(-(-_count_elements(shape) // 4), device=device)
    positions = _as_positions(position).to(device)
    # Filled rather than embedded as constants: compiled code then serves every step.
    last_words = [torch.full((), number, dtype=torch.int64, device=device) for number in (step, stream)]
    # Compiled code is made for one seed, as one of 2^63 or more would not fit its integer arguments.
    seed = operator.index(seed)
    key = (seed & MASK, seed >> 32)
    drawn = []
    for some in _split(positions, len(blocks)):
        words = philox4x32((blocks, some[:, None], *last_words), key)
        drawn.append([_to_unit_interval(word) for word in words])
    return [torch.cat(parts) for parts in zip(*drawn, strict=True)]


def _split(positions: Tensor, blocks_each: int) -> tuple[Tensor, ...]:
    """Split positions (N,) into parts whose words are computed one after the other."""
    if torch.compiler.is_compiling():  # compiled code keeps no intermediate results
        return (positions,)
    at_once = CPU_BLOCKS if positions.device.type == "cpu" else DEVICE_BLOCKS
    return positions.split(max(1, at_once // max(1, blocks_each)))


def _to_unit_interval(word: Tensor) -> Tensor:
    # 2 x + 1 is an integer and 2^-33 a power of two, so that the only rounding is the conversion's, to nearest.
    return ((2 * word + 1).float() * 2.0**-33).clamp(max=1 - 2.0**-24)


def _in_order(numbers: list[Tensor], position: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Arrange the numbers of four words, (N, B) each, as (N, *shape), or as `shape` at a single position.

    Element e in C order is that of word e mod 4 and block e // 4.
    """
    flat = torch.stack(numbers, dim=-1).flatten(1)[:, : math.prod(shape)]
    size = (flat.shape[0], *shape) if isinstance(position, Tensor) else tuple(shape)
    return flat.reshape(size).contiguous()


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words for each counter, by Philox4x32 of 10 rounds.

    counter: four words, int64 tensors in [0, 2^32) that broadcast. key: two words. Returns words of the shape that they
    broadcast to. Source: Salmon et al. 2011, section 3.3.
    """
    # The mask changes no word. But where compiled code counts or takes an argument, Inductor multiplies in 32 bits, and
    # wrongly (https://github.com/pytorch/pytorch/issues/175966); a value that has been through a mask has all 64.
    a, b, c, d = (word & MASK for word in counter)
    for number in range(NUM_ROUNDS):
        first, second = ((word + number * more) & MASK for word, more in zip(key, KEY_INCREMENTS, strict=True))
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return a, b, c, d


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of the product of a word and (multiplier + 2^32).

    That product can exceed int64, where overflow is undefined in compiled code. With multiplier in [-2^31, 0),
    p = word * multiplier lies in (-2^63, 0]. The wanted product is p + 2^32 word: its low word is p modulo 2^32, its
    high word floor(p / 2^32) + word, and a shift of a negative number rounds down.
    """
    p = word * multiplier
    return (p >> 32) + word, p & MASK


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
