"""Precision of a network's arithmetic: float32, TF32 or bfloat16, in its own forward and backward pass only.

    float32    as torch computes by default: matrix products in full float32, convolutions in TF32 on GPUs that have it
    tf32       float32 numbers, of which matrix products and convolutions read 10 of 23 bits; only on GPUs that have it
    bfloat16   autocast: matrix products and convolutions in bfloat16; weights, norms and losses stay float32

torch switches TF32 by flags of the whole process, so that they are set around a pass and restored after it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dit.conditions import LabelsOrConditions
from dit.samplers import Model
from raydit.errors import InvalidInput


def weights_dtype(dtype: str) -> torch.dtype:
    """Return the dtype of weights that are stored in a precision: TF32 is a way to compute with float32 weights."""
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def has_tf32(device: str | torch.device) -> bool:
    """Return whether a device computes in TF32: NVIDIA GPUs of compute capability 8.0 (Ampere) or later do."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def missing_tf32(dtype: str, device: str | torch.device) -> str | None:
    """Return which device has no TF32, in words, if dtype is "tf32" and the device has none; None otherwise."""
    if dtype != "tf32" or has_tf32(device):
        return None
    device = torch.device(device)
    return f"this {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "this CPU"


def require_precision(field: str, dtype: str, device: str | torch.device) -> None:
    """Raise InvalidInput if samples in a precision cannot be drawn on a device. field: the recipe's, for the message.

    They are not drawn in float32 instead, because the protocol of a score says how it was computed.
    """
    if device_name := missing_tf32(dtype, device):
        raise InvalidInput(
            f"{field}: found 'tf32', and {device_name} has no TF32",
            "a GPU that has it (NVIDIA Ampere or later), because samples are those of the precision that is recorded",
            f'set evaluate.gpus_per_worker = 1 where there is such a GPU, or {field} = "float32"',
        )


@contextmanager
def tf32_products(device: str | torch.device, dtype: str) -> Iterator[None]:
    """Let matrix products and convolutions use TF32 inside the context if dtype is "tf32" and the device has it.

    For a backward pass, which autocast must not enclose; `network_precision` includes it for a forward pass. Outside,
    the flags are as they were, also after an exception.
    """
    if dtype != "tf32" or not has_tf32(device):
        yield
        return
    with _TF32_FLAGS:
        yield


class _Tf32Flags:
    """torch's flags of TF32: the first of the contexts that are open, in any thread, sets them, the last restores them.

    If each restored them, one that ends while another is open would leave them set for good.
    """

    def __init__(self) -> None:
        self._lock, self._open, self._earlier = threading.Lock(), 0, ("highest", True)

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._earlier = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
                _set_flags("high", True)
            self._open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                _set_flags(*self._earlier)


_TF32_FLAGS = _Tf32Flags()


def _set_flags(products: str, convolutions: bool) -> None:
    # Not fp32_precision or allow_tf32 for products: after these, torch refuses to read what extractors read and set.
    if torch.get_float32_matmul_precision() != products:  # setting what is set makes compiled code compile again
        torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def network_precision(device: str | torch.device, dtype: str, *, cache_weights: bool = True) -> Iterator[None]:
    """Compute the forward pass of a network inside the context in a precision: "float32", "tf32" or "bfloat16".

    On a device without TF32, "tf32" is float32. cache_weights: keep the bfloat16 copies of weights until the context
    ends, for a backward pass or for several calls.
    """
    kind = torch.device(device).type
    enabled = dtype == "bfloat16"
    with (
        tf32_products(device, dtype),
        torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=cache_weights),
    ):
        yield


def backward_in(device: str | torch.device, dtype: str, loss: Tensor) -> None:
    """Run the backward pass of a loss whose network computed its forward pass in a precision."""
    with tf32_products(device, dtype):
        loss.backward()


def in_dtype(model: Model, dtype: str) -> Model:
    """Return the model to sample with: itself for "float32", or a wrapper that computes in another precision.

    The wrapper returns float32. Weights stay float32, and samplers and guidance compute in float32.
    """
    return model if dtype == "float32" else _InPrecision(model, dtype)


class _InPrecision:
    """Wrapper that runs a model in a precision and returns float32; see `in_dtype`."""

    def __init__(self, model: Model, dtype: str) -> None:
        self.model, self.dtype = model, dtype
        self.null_class = getattr(model, "null_class", None)

    def __call__(self, x: Tensor, t: Tensor, y: LabelsOrConditions = None) -> Tensor:
        # A forward pass reads every weight once, so that a cache of their casts would only take memory.
        with network_precision(x.device, self.dtype, cache_weights=False):
            output = self.model(x, t, y)
        return output.float()
