"""Peak performance of accelerators, from their vendors' data sheets. Imports no torch."""

import difflib
import re
from typing import NamedTuple

from raydit.errors import InvalidInput


class Accelerator(NamedTuple):
    """Data sheet of one device; FLOPs are per second and without sparsity."""

    bfloat16: float | None
    """FLOPs of bfloat16 matrix products; None if the device has no units for them."""
    tf32: float
    """FLOPs of float32 convolutions, which use TF32 by default; those of float32 where the device has no TF32."""
    float32: float
    """FLOPs of float32 matrix products, for which torch does not use TF32 by default."""
    memory_gib: float
    """Memory in GiB."""
    memory_bandwidth: float
    """Bandwidth of the memory, in bytes per second."""
    link: float
    """Approximate bus bandwidth of an all-reduce between the devices of a node, in bytes per second."""
    network: float
    """Bytes per second of one device's share of the network card that its nodes usually have."""
    dollars_per_hour: float
    """Assumed price: roughly the list price of clouds on demand. Prices change, and differ by a factor of three."""


ACCELERATORS: dict[str, Accelerator] = {
    "B200": Accelerator(2250e12, 1100e12, 80e12, 180, 8e12, 700e9, 50e9, 6.0),
    "H200": Accelerator(989e12, 494e12, 67e12, 141, 4.8e12, 350e9, 50e9, 4.0),
    "H100 NVL": Accelerator(835e12, 418e12, 60e12, 94, 3.9e12, 25e9, 12e9, 2.8),
    "H100 PCIe": Accelerator(756e12, 378e12, 51e12, 80, 2e12, 25e9, 12e9, 2.5),
    "H100": Accelerator(989e12, 494e12, 67e12, 80, 3.35e12, 350e9, 50e9, 3.0),
    "A100-SXM4-40GB": Accelerator(312e12, 156e12, 19.5e12, 40, 1.55e12, 230e9, 12e9, 1.5),
    "A100-PCIE-40GB": Accelerator(312e12, 156e12, 19.5e12, 40, 1.55e12, 25e9, 12e9, 1.4),
    "A100": Accelerator(312e12, 156e12, 19.5e12, 80, 2e12, 230e9, 25e9, 2.0),
    "A10G": Accelerator(70e12, 35e12, 35e12, 24, 600e9, 10e9, 3e9, 1.0),
    "L40S": Accelerator(362e12, 183e12, 91.6e12, 48, 864e9, 20e9, 6e9, 1.9),
    "L4": Accelerator(121e12, 60e12, 30.3e12, 24, 300e9, 10e9, 3e9, 0.8),
    "RTX 4090": Accelerator(165e12, 82.6e12, 82.6e12, 24, 1e12, 10e9, 1e9, 0.5),
    "V100": Accelerator(None, 15.7e12, 15.7e12, 16, 900e9, 130e9, 3e9, 2.5),
    "T4": Accelerator(None, 8.1e12, 8.1e12, 16, 320e9, 8e9, 3e9, 0.5),
}
"""Data sheets by words of the device name that CUDA reports; the first key that occurs in the name counts."""


def accelerator_of(device_name: str) -> str | None:
    """Return the key of ACCELERATORS for a device name that CUDA reports, such as "NVIDIA H100 80GB HBM3", or None."""
    return next((key for key in ACCELERATORS if re.search(rf"\b{re.escape(key)}\b", device_name)), None)


def known_accelerator(device_name: str) -> Accelerator | None:
    """Return the data sheet for a device name that CUDA reports, or None."""
    key = accelerator_of(device_name)
    return None if key is None else ACCELERATORS[key]


def accelerator_named(name: str) -> str:
    """Return the key of ACCELERATORS that equals `name` up to case. Raises InvalidInput, suggesting the nearest key."""
    keys = {key.lower(): key for key in ACCELERATORS}
    if name.lower() in keys:
        return keys[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), keys, n=1, cutoff=0.4)
    suggestion = f"choose one of them; did you mean {keys[nearest[0]]}?" if nearest else "choose one of them"
    raise InvalidInput(f"found the device {name!r}", f"one of {', '.join(ACCELERATORS)}", suggestion)
