"""A model of how long a data-parallel training step takes on accelerators; needs no torch.

A step is the forward pass, then the backward pass, which overlaps with the gradient all-reduce, then the update by
optimiser and averages, which memory bandwidth bounds.
"""

from typing import NamedTuple

from dit.accelerators import Accelerator
from dit.config import DiTConfig, UViTConfig
from dit.macs import forward_macs
from pipelines.config.training import TrainConfig
from pipelines.planning.sizes import FLOAT32, count_parameters

MIN_BLOCK_SECONDS = 100e-6
"""Seconds of a block's forward pass on however few images: about 20 kernels of 5 microseconds to launch."""


class StepSeconds(NamedTuple):
    """Seconds of one training step."""

    forward: float
    backward: float
    all_reduce: float
    """Gradient all-reduce, or FSDP's gathers of weights and scatter of gradients; overlaps with the backward pass."""
    update: float
    """Optimiser, averages and gradient norm."""

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return self.forward + max(self.backward, self.all_reduce) + self.update


def training_flops(model: DiTConfig | UViTConfig) -> int:
    """Return the FLOPs of a training step per image: those of the forward pass, and twice as many backward.

    What gradient checkpointing recomputes does not count, as it does not in MFU.
    """
    return 6 * forward_macs(model)


def step_seconds(
    model: DiTConfig | UViTConfig,
    settings: TrainConfig,
    accelerator: Accelerator,
    flops_per_second: float,
    *,
    workers_per_node: int,
) -> StepSeconds:
    """Return the seconds of a training step whose workers have one accelerator each.

    flops_per_second: what one worker reaches in matrix products.
    """
    workers, fsdp, counts = settings.most_workers, settings.strategy == "fsdp", count_parameters(model)
    arithmetic = 2 * forward_macs(model) * (settings.global_batch_size / workers) / flops_per_second
    forward = max(arithmetic, model.depth * MIN_BLOCK_SECONDS)
    # A ring all-reduce moves 2 (n - 1) / n of the gradients; FSDP gathers weights twice and scatters gradients once.
    moved = (3 if fsdp else 2) * (workers - 1) / workers * FLOAT32 * counts.trained
    one_node = workers <= workers_per_node
    bandwidth = accelerator.link if one_node else min(accelerator.link, workers_per_node * accelerator.network)
    # AdamW reads or writes each parameter 7 times, each average 3 times, and the gradient norm reads it twice.
    averages = 1 + len(settings.ema_sigma_rels)
    updated = FLOAT32 * (9 * counts.trained + 3 * averages * counts.total)
    return StepSeconds(
        forward=forward,
        backward=2 * forward + (forward if model.gradient_checkpointing else 0),
        all_reduce=moved / bandwidth,
        update=updated / (workers if fsdp else 1) / accelerator.memory_bandwidth,
    )
