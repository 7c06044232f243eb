"""How fast devices multiply matrices at most: what a training step's speed is compared with."""

import time

import torch

Peaks = dict[str, float]

PEAK_FLOPS: dict[str, Peaks] = {
    "B200": {"bfloat16": 2250e12, "float32": 80e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "A10G": {"bfloat16": 70e12, "float32": 35e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float32": 30.3e12},
    "RTX 4090": {"bfloat16": 165e12, "float32": 82.6e12},
    "V100": {"float32": 15.7e12},
    "T4": {"float32": 8.1e12},
}
"""FLOPs per second without sparsity, by a part of the device's name and the dtype, from the makers' data sheets.
float32 is that of torch's default, without TF32."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second that a device can do at most: from its data sheet, or as measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = next((peaks for part, peaks in PEAK_FLOPS.items() if part in name), {})
        if known := peaks.get(str(dtype).removeprefix("torch.")):
            return known
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the best of some products of square matrices: tenths of a second on a CPU core."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # the number is there when the product is done
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
