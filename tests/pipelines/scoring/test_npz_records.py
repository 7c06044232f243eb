"""Records are read as numpy reads them."""

import io
import zipfile

import numpy as np
import pytest

from pipelines.scoring.records import read_arrays


def saved(**arrays) -> io.BytesIO:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return file


ARRAYS = {
    "features": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
    "transposed": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "images": np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3),
    "keys": np.array(["a", "\u00e9\u00e9"]),
    "nothing": np.array([]),
    "no_keys": np.array([], dtype=str),
    "big_endian": np.arange(3, dtype=">i4"),
    "seconds": np.float64(1.5),
}


def test_arrays_are_those_that_numpy_reads():
    found, expected = read_arrays(saved(**ARRAYS)), np.load(saved(**ARRAYS), allow_pickle=False)
    assert list(found) == expected.files == list(ARRAYS)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and array.flags.writeable
        np.testing.assert_array_equal(array, expected[name])


def test_what_is_left_out_is_not_there():
    assert list(read_arrays(saved(**ARRAYS), without=("images", "keys", "other"))) == [
        name for name in ARRAYS if name not in ("images", "keys")
    ]


def test_nothing_is_unpickled():
    with pytest.raises(ValueError, match="array of objects"):
        read_arrays(saved(features=np.array([{}], dtype=object)))


def test_a_file_that_was_cut_off_is_refused():
    with pytest.raises(zipfile.BadZipFile):
        read_arrays(io.BytesIO(saved(**ARRAYS).getvalue()[:-30]))


def test_an_array_in_a_later_format_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members, members.open("features.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros(3), version=(2, 0))
    with pytest.raises(ValueError, match=r"format \(2, 0\)"):
        read_arrays(file)
