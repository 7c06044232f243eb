"""Reading many small .npz files, of which numpy spends half the time on parsing headers that are all alike."""

import io
import zipfile
from collections.abc import Collection
from functools import lru_cache
from typing import BinaryIO

import numpy as np

_MAGIC_BYTES, _LENGTH_BYTES = 8, 2
"""Of format 1.0: what it is, and the length of the header, which tells type, order and shape."""


def read_arrays(file: BinaryIO, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a file that np.savez wrote, by name, without some of them.

    Raises zipfile.BadZipFile for what is not whole, ValueError for an array of objects: nothing is unpickled.
    """
    with zipfile.ZipFile(file) as members:
        names = {member: member.removesuffix(".npy") for member in members.namelist()}
        return {name: _array(members.read(member)) for member, name in names.items() if name not in without}


def _array(data: bytes) -> np.ndarray:
    begin = _MAGIC_BYTES + _LENGTH_BYTES
    end = begin + int.from_bytes(data[_MAGIC_BYTES:begin], "little")
    shape, fortran_order, dtype = _parsed(data[:end])
    if dtype.hasobject:
        raise ValueError("found an array of objects, expected numbers or text: it is not one of raydit's records")
    # A copy, which can be written to.
    return np.ndarray(shape, dtype, data, offset=end, order="F" if fortran_order else "C").copy(order="K")


@lru_cache
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(header)
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"found an array in format {version}, expected (1, 0), as np.savez writes those of raydit")
    return np.lib.format.read_array_header_1_0(file)
