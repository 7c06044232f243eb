"""Philox4x32-10, a hash of a counter and a key to random words: in torch for any device, in NumPy for CPUs.

Both return the same words. In NumPy, where an operation costs little besides its arithmetic, small batches take a
fifth of the time. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3
(https://doi.org/10.1145/2063384.2063405).
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Key = tuple[int, int]
"""Two words."""
MASK = 0xFFFFFFFF
"""The 32 bits of a word. In torch, words are int64 in [0, 2^32): it hardly computes with unsigned integers."""
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
"""What each round adds to the two words of the key."""
NUM_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words for each counter, as torch tensors of the shape that the counter's words broadcast to.

    counter: four words, int64 tensors in [0, 2^32). Can be compiled.
    """
    # The mask changes no word. But where compiled code counts or takes an argument, Inductor multiplies in 32 bits, and
    # wrongly (https://github.com/pytorch/pytorch/issues/175966); a value that has been through a mask has all 64.
    a, b, c, d = (word & MASK for word in counter)
    for first, second in _round_keys(key):
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return a, b, c, d


def philox4x32_numpy(counter: Sequence[np.ndarray | int], key: Key) -> np.ndarray:
    """Return four random words for each counter, uint32 (4, ...), in the shape that the counter's words broadcast to.

    counter: four words, integer arrays or numbers in [0, 2^32).
    """
    shape = np.broadcast_shapes(*map(np.shape, counter))
    words = np.empty((4, math.prod(shape)), np.uint32)
    for row, word in zip(words.reshape(4, *shape, 1), counter, strict=True):
        row[..., 0] = word
    even, odd = words[0::2].copy(), words[1::2]  # (2, n): the words to multiply, and those to mix in
    multipliers = np.array(MULTIPLIERS, np.uint64)[:, None]
    # In turn, because `odd` is a half of the products of the round before.
    buffers = [np.empty(even.shape, np.uint64) for _ in range(2)]
    halves = [products.view("<u4").reshape(*even.shape, 2)[::-1] for products in buffers]
    for number, keys in enumerate(np.array(_round_keys(key), np.uint32)[..., None]):
        np.multiply(even, multipliers, out=buffers[number % 2])
        half = halves[number % 2]
        np.bitwise_xor(half[..., 1], odd, out=even)
        np.bitwise_xor(even, keys, out=even)
        odd = half[..., 0]
    words[0::2], words[1::2] = even, odd
    return words.reshape(4, *shape)


def _round_keys(key: Key) -> list[Key]:
    first, second = KEY_INCREMENTS
    return [((key[0] + number * first) & MASK, (key[1] + number * second) & MASK) for number in range(NUM_ROUNDS)]


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product.

    It can exceed int64, where overflow is undefined in compiled code. With 2^32 less in the multiplier, which is then
    in [-2^31, 0), p = word * (multiplier - 2^32) lies in (-2^63, 0]. The wanted product is p + 2^32 word: its low word
    is p modulo 2^32, its high word floor(p / 2^32) + word, and a shift of a negative number rounds down.
    """
    p = word * (multiplier - 2**32)
    return (p >> 32) + word, p & MASK
