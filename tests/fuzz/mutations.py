"""Random changes of valid files. Equal seeds give equal changes."""

import random
from collections.abc import Sequence

NUMBERS = [0, 1, 7, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
"""Numbers that lengths and counts are replaced by, as integers of 1 to 8 bytes in either order."""
TOKENS = [b"[", b"{", b'"', b"'", b"\0", b"\n", b"\r", b"\xff", b"-1", b"1e300", b"NaN", b"null", b"true", b"9" * 400]
TOKENS += [
    b"[" * 200,
    b"{" * 200,
    b"../",
    b"/",
    b"**/",
    b"*a*a",
    b": ",
    b"&a *a",
    b"<<: ",
    b"---\n",
    b"=",
    b"#",
    b",",
    b";",
]
"""Pieces that mean something in a text format."""


def mutate(data: bytes, random: random.Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Return a file with one to eight changes. tokens: pieces that mean something in its format, besides TOKENS."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(changed) + 1)
        length = min(random.choice((1, 2, 4, 8, 16, 64, 512)), len(changed) - at)
        kind = random.randrange(8)
        if kind == 0 and length:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            size = random.choice((1, 2, 4, 8))
            number = random.choice(NUMBERS) % 256**size
            changed[at : at + size] = number.to_bytes(size, random.choice(("little", "big")))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length] * random.choice((1, 2, 20, 300))
        elif kind == 5:
            changed[at : at + length] = random.randbytes(length)
        else:
            token = random.choice((*TOKENS, *tokens))
            changed[at : at + random.choice((0, len(token)))] = token
    return bytes(changed)
