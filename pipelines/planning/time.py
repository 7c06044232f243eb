"""How long a data-parallel training step takes on accelerators; needs no torch.

A model of a step, not a measurement: the forward pass, then the backward pass beside which gradients are exchanged,
then the optimiser and the averages, which only move memory.
"""

from typing import Literal, NamedTuple

from dit.accelerators import Accelerator
from dit.config import DiTConfig, UViTConfig
from dit.macs import forward_macs
from dit.schedule import TrainingConfig
from pipelines.planning.sizes import FLOAT32, count_parameters

Strategy = Literal["ddp", "fsdp"]
LEAST_BLOCK_SECONDS = 100e-6
"""Of a block's forward pass, however few its images: about 20 kernels that take 5 microseconds to launch."""


class StepSeconds(NamedTuple):
    """Seconds of a step by what they are spent on."""

    forward: float
    backward: float
    exchange: float
    """Of gradients, and under FSDP of weights; it goes on beside the backward pass."""
    update: float
    """Optimiser, averages, and the norm of the gradients."""

    @property
    def total(self) -> float:
        return self.forward + max(self.backward, self.exchange) + self.update


def training_flops(config: DiTConfig | UViTConfig) -> int:
    """FLOPs of a training step for one image: twice the forward pass's multiply-accumulates, and twice that backward.

    Passes that gradient checkpointing computes again do not count, as they do not in MFU.
    """
    return 6 * forward_macs(config)


def step_seconds(
    config: DiTConfig | UViTConfig,
    settings: TrainingConfig,
    accelerator: Accelerator,
    *,
    flops_per_second: float,
    workers: int,
    workers_per_node: int,
    strategy: Strategy = "ddp",
) -> StepSeconds:
    """A step of `settings.global_batch_size` images on so many workers with an accelerator each.

    flops_per_second: what one worker reaches in matrix products.
    """
    images = settings.global_batch_size / workers
    arithmetic = 2 * forward_macs(config) * images / flops_per_second
    forward = max(arithmetic, config.depth * LEAST_BLOCK_SECONDS)
    again = forward if config.gradient_checkpointing else 0
    shards = workers if strategy == "fsdp" else 1
    return StepSeconds(
        forward=forward,
        backward=2 * forward + again,
        exchange=exchange_seconds(config, accelerator, workers, workers_per_node, strategy),
        update=update_bytes(config, settings) / shards / accelerator.memory_bandwidth,
    )


def exchange_seconds(
    config: DiTConfig | UViTConfig, accelerator: Accelerator, workers: int, workers_per_node: int, strategy: Strategy
) -> float:
    """An all-reduce in rings moves 2 (n - 1) / n of the gradients; FSDP gathers weights twice and scatters once."""
    if workers == 1:
        return 0.0
    passes = 3 if strategy == "fsdp" else 2
    moved = passes * (workers - 1) / workers * FLOAT32 * count_parameters(config).trained
    within = workers <= workers_per_node
    return moved / (accelerator.link if within else min(accelerator.link, workers_per_node * accelerator.network))


def update_bytes(config: DiTConfig | UViTConfig, settings: TrainingConfig) -> int:
    """Bytes read and written: 7 passes over a parameter by AdamW, 3 by each average, 2 for the gradients' norm."""
    counts = count_parameters(config)
    averages = 1 + len(settings.ema_sigma_rels)
    return FLOAT32 * (9 * counts.trained + 3 * averages * counts.total)
