"""torch's errors of devices that are full or cannot be used, as errors for users."""

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

from raydit.errors import Failed

FULL = re.compile("out of memory|can't allocate memory")
"""Parts of out-of-memory messages: of torch's allocators, of the GPU libraries that it calls, and of the CPU."""
SHOWN_SENTENCES = 3
"""Sentences of a message: what is full, what was asked for, and of how much. The others are advice for developers."""


@contextmanager
def explain_full_memory(do: str) -> Iterator[None]:
    """Replace torch's out-of-memory errors, on a GPU or on the CPU, by Failed.

    do: which settings take less memory. torch's error is a RuntimeError, as that of a worker that lost its peer is.
    """
    try:
        yield
    except RuntimeError as error:
        if not FULL.search(str(error)):
            raise
        sentences = str(error).splitlines()[0].split(". ")[:SHOWN_SENTENCES]
        raise Failed(". ".join(sentences).rstrip("."), "", do) from error


def worker_device(gpus_per_worker: float) -> str:
    """Return the device that a worker computes on. Raises Failed if it is a GPU that torch cannot use."""
    if not gpus_per_worker:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise Failed(
            f"gpus_per_worker is {gpus_per_worker:g}, and torch {torch.__version__} finds no GPU on {platform.node()}",
            "a GPU that torch can use",
            "install a torch that fits the driver there (`raydit doctor`), or set gpus_per_worker = 0",
        )
    return "cuda"
