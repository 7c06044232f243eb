"""torch's errors of devices as users see them: memory that is full, and a GPU that cannot be used."""

import pytest
import torch

from dit.hardware.device_errors import explain_full_memory, worker_device
from raydit.errors import Failed

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.12 GiB is "
    "free. Including non-PyTorch memory, this process has 77.98 GiB memory in use. Of the allocated memory 70.1 GiB "
    "is allocated by PyTorch, and 1.2 GiB is reserved by PyTorch but unallocated."
)


def test_a_full_gpu_is_an_error_for_users_that_says_what_takes_less():
    with pytest.raises(Failed) as raised, explain_full_memory("lower encode.batch_size"):
        raise torch.OutOfMemoryError(ON_A_GPU)
    assert str(raised.value) == (
        "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.12 GiB is "
        "free. Lower encode.batch_size"
    )


def test_a_full_machine_is_too():
    with pytest.raises(Failed, match=r"can't allocate memory.* Lower encode.batch_size$"):
        with explain_full_memory("lower encode.batch_size"):
            torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_are_left_as_they_are():
    lost = RuntimeError("connection closed by peer")
    with pytest.raises(RuntimeError) as raised, explain_full_memory("lower encode.batch_size"):
        raise lost
    assert raised.value is lost


def test_a_worker_without_the_gpu_that_its_recipe_asks_for_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker_device(0) == "cpu"
    with pytest.raises(
        Failed, match="gpus_per_worker is 0.5, and torch .* finds no GPU .*expected a GPU that torch can use"
    ):
        worker_device(0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_device(1) == "cuda"
