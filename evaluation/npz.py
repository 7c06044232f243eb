"""Checks of .npz files before they are read: the arrays must be as large as the file says, and hold no objects.

NumPy allocates what the header of an array claims: 244 bytes may claim ten billion images.
"""

import math
import os
import zipfile
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from raydit.errors import InvalidInput

MAX_RATIO = 200
"""Largest ratio of an array to its compressed bytes. Deflate reaches 1,032 with zeros, and photographs less than 2."""
ALWAYS_ALLOWED = 1 << 24
"""Bytes of a compressed array that may be zeros."""


class ArrayHeader(NamedTuple):
    """What an array in an .npz file is, before it is read."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    offset: int
    """Bytes of the header, behind which the values begin."""


def check_npz(file: BinaryIO, name: str, max_ratio: int = MAX_RATIO) -> dict[str, ArrayHeader]:
    """Return the header of every array in an .npz file by its name, and rewind the file.

    name: the file's name in messages. max_ratio: of an array to its compressed bytes. Raises InvalidInput for another
    kind of file, for arrays that are larger than the bytes that are there, and for arrays of objects, which would be
    unpickled.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            headers = {}
            if sum(info.compress_size for info in members.values()) > file.seek(0, os.SEEK_END):
                raise zipfile.BadZipFile("its arrays are longer than the file")
            for key, info in members.items():
                with archive.open(info) as member:
                    headers[key] = _read_header(member)
    except Exception as error:  # of a malformed file: anything from BadZipFile to MemoryError
        raise InvalidInput(
            f"{name}: found no .npz file that can be read ({type(error).__name__}: {str(error)[:200]})",
            "a complete archive of arrays that NumPy wrote",
            "copy it again",
        ) from error
    for key, header in headers.items():
        _check_size(f"{name}: {key}", header, members[key], max_ratio)
    file.seek(0)
    return headers


def _read_header(member: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return ArrayHeader(*read(member), member.tell())


def _check_size(where: str, header: ArrayHeader, info: zipfile.ZipInfo, max_ratio: int) -> None:
    claimed = math.prod(header.shape) * header.dtype.itemsize
    found = info.file_size - header.offset
    largest = max(max_ratio * info.compress_size, ALWAYS_ALLOWED)
    if header.dtype.hasobject or min(header.shape, default=0) < 0 or claimed > found or found > largest:
        raise InvalidInput(
            f"{where}: found an array of {header.dtype} {header.shape} in {info.compress_size:,} bytes",
            "numbers or text, as many as there are bytes for",
            "do not use the file: it was not written by NumPy, or was changed since",
        )
