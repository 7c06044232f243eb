"""Arrays in .npz files are held against the bytes that are there before NumPy allocates what they claim."""

import io
import struct
import zipfile

import numpy as np
import pytest

from evaluation.npz import check_npz
from evaluation.reference import ReferenceStatistics
from raydit.errors import InvalidInput


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def archive(compression=zipfile.ZIP_STORED, **members: bytes) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    buffer.seek(0)
    return buffer


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}\n"


@pytest.mark.parametrize(
    "member",
    [
        npy(HEADER.format("|u1", (10**10, 32, 32, 3))),
        npy(HEADER.format("<f8", (10**9,)), bytes(800)),
        npy(HEADER.format("<f8", (-1,)), bytes(8)),
        npy(HEADER.format("<U100000000", ())),
        npy(HEADER.format("|O", (1,)), b"x" * 100),
    ],
)
def test_claims_beyond_the_bytes_and_objects_are_refused(member):
    """244 bytes claimed ten billion images."""
    file = archive(mu=member, sigma=npy(HEADER.format("<f8", (1, 1)), bytes(8)))
    with pytest.raises(InvalidInput, match="x.npz: mu: found an array of .* as many as there are bytes for"):
        ReferenceStatistics.load(file, "x.npz")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        npy(HEADER.format("<f8", (1,)), bytes(8)),
        archive(mu=b"no array").getvalue(),
        archive(mu=npy("(" * 9000)).getvalue(),
        archive(mu=npy("[" * 60_000)).getvalue(),
        archive(mu=npy(HEADER.format("<f8", (1,)), bytes(8))).getvalue()[:-30],
    ],
)
def test_what_is_no_npz_file_is_told(content):
    with pytest.raises(InvalidInput, match=r"x.npz: found no .npz file that can be read"):
        ReferenceStatistics.load(io.BytesIO(content), "x.npz")


def test_a_megabyte_that_unpacks_to_gigabytes_is_refused():
    zeros = npy(HEADER.format("|u1", (1 << 26,))) + bytes(1 << 26)
    file = archive(zipfile.ZIP_DEFLATED, arr_0=zeros)
    assert len(file.getvalue()) < 1 << 20
    with pytest.raises(InvalidInput, match="arr_0: found an array"):
        check_npz(file, "x.npz")


def test_what_numpy_writes_passes(tmp_path):
    arrays = {
        "a": np.zeros((1000, 1000)),
        "b": np.array("text"),
        "c": np.asfortranarray(np.ones((2, 3))),
        "d": np.zeros(0),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        with open(tmp_path / "x.npz", "rb") as file:
            headers = check_npz(file, "x.npz")
            assert file.tell() == 0 and {name: header.shape for name, header in headers.items()} == {
                name: array.shape for name, array in arrays.items()
            }
            assert headers["c"].is_fortran and headers["a"].dtype == np.float64


@pytest.mark.parametrize("meta", ["[]", "{", '{"n": "5"}', '{"unknown": 1}', "[" * 100_000])
def test_meta_that_is_none_is_told(tmp_path, meta):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.zeros((2, 2)), meta=np.array(meta))
    with open(tmp_path / "x.npz", "rb") as file, pytest.raises(InvalidInput, match="x.npz: found .* as meta"):
        ReferenceStatistics.load(file, "x.npz")
