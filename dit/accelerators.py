"""What accelerators can do at most, from their makers' data sheets; needs no torch."""

import difflib
from typing import NamedTuple


class Accelerator(NamedTuple):
    """One device. FLOPs are per second and without sparsity."""

    bfloat16: float | None
    """FLOPs of matrix products; None where the device has no units for them."""
    tf32: float
    """FLOPs of float32 convolutions, which torch lets use TF32 by default; float32's where there is none."""
    float32: float
    """FLOPs of float32 matrix products, which by torch's default do not use TF32."""
    memory_gib: float
    memory_bandwidth: float
    """Bytes per second."""
    link: float
    """Bytes per second between the devices of a node that an all-reduce reaches (bus bandwidth), about."""
    network: float
    """Bytes per second of a device's share of its node's network card, as nodes with it usually have."""
    dollars_per_hour: float
    """An assumption: about what clouds list for one on demand. Prices differ by a factor of three, and change."""


ACCELERATORS: dict[str, Accelerator] = {
    "B200": Accelerator(2250e12, 1100e12, 80e12, 180, 8e12, 700e9, 50e9, 6.0),
    "H200": Accelerator(989e12, 494e12, 67e12, 141, 4.8e12, 350e9, 50e9, 4.0),
    "H100 PCIe": Accelerator(756e12, 378e12, 51e12, 80, 2e12, 25e9, 12e9, 2.5),
    "H100": Accelerator(989e12, 494e12, 67e12, 80, 3.35e12, 350e9, 50e9, 3.0),
    "A100-SXM4-40GB": Accelerator(312e12, 156e12, 19.5e12, 40, 1.55e12, 230e9, 12e9, 1.5),
    "A100": Accelerator(312e12, 156e12, 19.5e12, 80, 2e12, 230e9, 25e9, 2.0),
    "A10G": Accelerator(70e12, 35e12, 35e12, 24, 600e9, 10e9, 3e9, 1.0),
    "L40S": Accelerator(362e12, 183e12, 91.6e12, 48, 864e9, 20e9, 6e9, 1.9),
    "L4": Accelerator(121e12, 60e12, 30.3e12, 24, 300e9, 10e9, 3e9, 0.8),
    "RTX 4090": Accelerator(165e12, 82.6e12, 82.6e12, 24, 1e12, 10e9, 1e9, 0.5),
    "V100": Accelerator(None, 15.7e12, 15.7e12, 16, 900e9, 130e9, 3e9, 2.5),
    "T4": Accelerator(None, 8.1e12, 8.1e12, 16, 320e9, 8e9, 3e9, 0.5),
}
"""By a part of the device's name as CUDA tells it; the first that is in it counts."""


def known_accelerator(device_name: str) -> Accelerator | None:
    """By the name that CUDA tells, such as "NVIDIA H100 80GB HBM3"."""
    return next((accelerator for part, accelerator in ACCELERATORS.items() if part in device_name), None)


def accelerator_named(name: str) -> str:
    """The key of ACCELERATORS that a person means, whatever the case. Raises ValueError with the nearest."""
    keys = {key.lower(): key for key in ACCELERATORS}
    if name.lower() in keys:
        return keys[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), keys, n=1, cutoff=0.4)
    hint = f"did you mean {keys[nearest[0]]}?" if nearest else "choose one of them"
    raise ValueError(f"found the device {name!r}, expected one of {', '.join(ACCELERATORS)}: {hint}")
