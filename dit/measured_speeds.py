"""How fast transformers ran on one NVIDIA H200, by which plans and advice speak of GPUs of its kind; needs no torch.

Measured in November 2026 with torch 2.11 at commit 707a9da, by a benchmark of torch alone. The card's own product of
8192 x 8192 matrices in bfloat16 reached 734 to 771 TFLOP/s; training DiT-XL/2 reached 0.55 of that.
"""

from dit.config import named_config
from dit.macs import forward_macs

MEASURED_ON = "H200"
"""Key of ACCELERATORS."""
COMPILED = "bfloat16 compiled"
"""Key of compiled networks in bfloat16, beside the dtypes of networks that are not compiled."""

TRAINED_IMAGES_PER_SECOND = {"DiT-S/2": 5122.0, "DiT-B/2": 2614.0, "DiT-XL/2": 568.0}
"""Images per second of training steps in bfloat16, compiled block by block; batches of 256, XL/2's of 128.
Compiled as a whole, DiT-XL/2 reached 580."""

SAMPLING_STEP_SECONDS = {"float32": 0.346, "tf32": 0.087, "bfloat16": 0.051, COMPILED: 0.037}
"""Seconds of a guided sampling step of 32 images with DiT-XL/2: a forward pass of SAMPLING_BATCH images. 50,000 samples
of 250 steps take 37.6, 9.4, 5.5 and 4.0 hours."""
SAMPLING_MODEL = "DiT-XL/2"
SAMPLING_BATCH = 64
"""Images of a forward pass, as guidance doubles the batch."""


def sampling_speedup(precision: str) -> float:
    """Return how many times as fast as in float32 samples are drawn. precision: a key of SAMPLING_STEP_SECONDS."""
    return SAMPLING_STEP_SECONDS["float32"] / SAMPLING_STEP_SECONDS[precision]


def training_flops(width: int) -> tuple[str, float] | None:
    """Return the model whose training in compiled bfloat16 stands for one of `width`, and its FLOPs per second.

    It is the widest that is no wider; None for models narrower than all that were measured.
    """
    configs = {name: named_config(name) for name in TRAINED_IMAGES_PER_SECOND}
    fitting = [name for name, config in configs.items() if config.hidden_size <= width]
    if not fitting:
        return None
    name = max(fitting, key=lambda name: configs[name].hidden_size)
    return name, 6 * forward_macs(configs[name]) * TRAINED_IMAGES_PER_SECOND[name]


def sampling_flops(width: int, precision: str) -> tuple[str, float] | None:
    """Return the same of sampling; precision: a key of SAMPLING_STEP_SECONDS, or another, for which it is None."""
    config = named_config(SAMPLING_MODEL)
    if width < config.hidden_size or precision not in SAMPLING_STEP_SECONDS:
        return None
    return SAMPLING_MODEL, SAMPLING_BATCH * 2 * forward_macs(config) / SAMPLING_STEP_SECONDS[precision]
