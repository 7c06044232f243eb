"""Writing weights where there is no room."""

import errno

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dit.files import full_disk_as_oserror


def test_a_full_disk_is_an_oserror_that_names_the_place(tiny_disk):
    file = tiny_disk / "weights.safetensors"
    with pytest.raises(OSError, match="No space left.*weights") as refused, full_disk_as_oserror(file):
        save_file({"w": torch.zeros(1_000_000)}, file)
    assert refused.value.errno == errno.ENOSPC


def test_other_errors_stay_what_they_are(tmp_path):
    file = tmp_path / "nowhere" / "weights.safetensors"
    with pytest.raises(SafetensorError), full_disk_as_oserror(file):
        save_file({"w": torch.zeros(1)}, file)
