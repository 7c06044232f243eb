"""Shares of peak that transformers reach on GPUs of the kind that was measured (`dit.hardware.measured_speeds`).

Only the H200 was measured. An H100 is planned with the same shares of its own peak, as if its matrix products
reached the same share of peak: their chips are of one kind.
"""

from typing import NamedTuple

from dit.config import named_config
from dit.hardware.accelerators import ACCELERATORS, Accelerator
from dit.hardware.measured_speeds import (
    COMPILED,
    MEASURED_ON,
    SAMPLING_BATCH,
    SAMPLING_MODEL,
    SAMPLING_STEP_SECONDS,
    TRAINING,
)
from dit.macs import forward_macs
from pipelines.planning.networks import FLOAT32, count_parameters

SAME_KIND = ("H100", "H100 NVL", "H100 PCIe")
"""Keys of ACCELERATORS for which the measured shares are assumed."""


class MeasuredShare(NamedTuple):
    """A share of an accelerator's peak that was measured, and what it was measured with."""

    share: float
    basis: str
    """Beginning of a sentence that ends with the share."""


def measured_share(accelerator: str, kind: str, precision: str, width: int) -> MeasuredShare | None:
    """Return the share of its peak in a precision that an accelerator reaches with a transformer.

    accelerator: a key of ACCELERATORS. kind: "train" or "evaluate". precision: such as "tf32" or "bfloat16 compiled".
    width: of the transformer; what the widest measured model that is no wider has reached stands for it. None if
    nothing that was measured stands for it.
    """
    if accelerator not in (MEASURED_ON, *SAME_KIND):
        return None
    if kind == "train" and precision == COMPILED:
        found = _training_flops(width)
    elif kind == "evaluate" and precision in SAMPLING_STEP_SECONDS:
        found = _sampling_flops(width, precision)
    else:
        return None
    if found is None:
        return None
    model, flops = found
    measured = f"measured on an {MEASURED_ON} with {model}"
    basis = measured if accelerator == MEASURED_ON else f"assumed, as {measured}"
    return MeasuredShare(flops / getattr(ACCELERATORS[MEASURED_ON], precision.partition(" ")[0]), basis)


def _training_flops(width: int) -> tuple[str, float] | None:
    """Return the model that stands for one of `width`, and its FLOPs per second in forward and backward pass."""
    widths = {name: named_config(name).hidden_size for name in TRAINING}
    name = max((name for name in TRAINING if widths[name] <= width), key=lambda name: widths[name], default=None)
    if name is None:
        return None
    config, (batch, images_per_second) = named_config(name), TRAINING[name]
    update = update_seconds(count_parameters(config).trained, ACCELERATORS[MEASURED_ON])
    return name, batch * 6 * forward_macs(config) / (batch / images_per_second - update)


def _sampling_flops(width: int, precision: str) -> tuple[str, float] | None:
    config = named_config(SAMPLING_MODEL)
    if width < config.hidden_size:
        return None
    return SAMPLING_MODEL, SAMPLING_BATCH * 2 * forward_macs(config) / SAMPLING_STEP_SECONDS[precision]


def update_seconds(trained: int, accelerator: Accelerator, averages: int = 1) -> float:
    """Return the seconds of a step's update of weights and averages, which memory bandwidth bounds.

    trained: number of parameters that are trained; what is frozen, and its averages, are not touched.
    """
    # AdamW reads or writes each parameter 7 times, each average 3 times, and the gradient norm reads it twice.
    return FLOAT32 * (9 + 3 * averages) * trained / accelerator.memory_bandwidth
