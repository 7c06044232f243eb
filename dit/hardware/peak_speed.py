"""Peak speed of matrix products on a device, to which the speed of training is compared (MFU)."""

import time

import torch

from dit.hardware.accelerators import known_accelerator
from dit.precision import tf32_products, weights_dtype


def peak_flops(device: torch.device, dtype: str) -> float:
    """Return the peak FLOPs per second of a device: from its data sheet if it is known, or else measured now.

    dtype: a precision of `dit.precision`.
    """
    if device.type == "cuda":
        accelerator = known_accelerator(torch.cuda.get_device_name(device))
        peak: float | None = getattr(accelerator, dtype) if accelerator else None
        if peak:
            return peak
    with tf32_products(device, dtype):
        return measured_flops(device, weights_dtype(dtype))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of the fastest of four square matrix products.

    Takes some tenths of a second on a CPU core.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a number waits for the product
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
