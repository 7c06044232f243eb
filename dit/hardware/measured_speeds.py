"""How fast transformers ran on one NVIDIA H200, used for plans and advice about GPUs of this kind. Imports no torch.

Measured in November 2026 with torch 2.11 at commit 707a9da, by a benchmark of torch alone. The GPU's own product of
8192 x 8192 matrices in bfloat16 reached 734 to 771 TFLOP/s; training DiT-XL/2 reached 0.55 of that.
"""

from typing import NamedTuple

MEASURED_ON = "H200"
"""Key of ACCELERATORS."""
COMPILED = "bfloat16 compiled"
"""Key of compiled networks in bfloat16, beside the dtypes of networks that are not compiled."""


class TrainingSpeed(NamedTuple):
    """The speed of whole training steps, updates of weights and averages included."""

    batch: int
    """Images of a step."""
    images_per_second: float


TRAINING = {
    "DiT-S/2": TrainingSpeed(256, 5122.0),
    "DiT-B/2": TrainingSpeed(256, 2614.0),
    "DiT-XL/2": TrainingSpeed(128, 568.0),
}
"""Training in bfloat16, compiled block by block. Compiled as a whole, DiT-XL/2 reached 580 images/s."""

SAMPLING_STEP_SECONDS = {"float32": 0.346, "tf32": 0.087, "bfloat16": 0.051, COMPILED: 0.037}
"""Seconds of a guided sampling step of SAMPLING_MODEL, a forward pass of SAMPLING_BATCH images.

50,000 guided samples of 250 steps take 37.6, 9.4, 5.5 and 4.0 hours."""
SAMPLING_MODEL = "DiT-XL/2"
SAMPLING_BATCH = 64
"""Images of a forward pass: a batch of 32, which guidance doubles."""

ENCODING = {"float32": 498.0, "bfloat16": 741.0}
"""Images of 256 pixels per second that Stable Diffusion's autoencoder encodes, contiguous, in batches of 32. In float32
its convolutions use TF32, as torch does by default."""


def sampling_speedup(precision: str) -> float:
    """Return how many times as fast as in float32 samples are drawn. precision: a key of SAMPLING_STEP_SECONDS."""
    return SAMPLING_STEP_SECONDS["float32"] / SAMPLING_STEP_SECONDS[precision]


def transformer_speedups(section: str) -> str:
    """Return in words how much faster than in float32 transformers are. section: a recipe's, with dtype and compile."""
    return (
        f"on a GPU {section}.dtype = 'tf32' is about {sampling_speedup('tf32'):.0f} times as fast, 'bfloat16' with "
        f"{section}.compile = true about {sampling_speedup(COMPILED):.0f} times (forward passes, measured on an "
        f"{MEASURED_ON})"
    )


def autoencoder_speedup(section: str) -> str:
    """Return in words how much faster than in float32 autoencoders are. section: a recipe's, with dtype."""
    return (
        f"on a GPU {section}.dtype = 'bfloat16' is about {ENCODING['bfloat16'] / ENCODING['float32']:.1f} times as "
        f"fast (encoding, measured on an {MEASURED_ON})"
    )
