"""The hardware that a plan is for, its assumed or measured speed, and the workers that fit on it."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.placement import count_fitting
from dit.hardware.accelerators import ACCELERATORS, Accelerator, accelerator_named
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import TrainConfig
from pipelines.planning.rates import measured_share
from raydit.errors import InvalidInput

NODE_DEVICES = 8
"""Accelerators per node, an assumption."""
CORES_PER_DEVICE = 12
"""CPU cores of a node per accelerator, an assumption."""
READ_SECONDS = 0.010
"""Seconds of a core to read a photograph of ImageNet's size and crop it, an assumption where nothing is measured."""
MULTICORE_EFFICIENCY = 0.8
"""Share of their single-core speed that several cores reach together, as they share caches, memory and units.
Training steps of the digits' model take 54 ms with two workers, and 45 ms with one that has as many images."""
Kind = Literal["encode", "train", "evaluate", "features"]
"""Kinds of arithmetic, named after the stages with most of it: the autoencoder, the transformer with gradients, the
transformer without gradients, and the feature extractor."""
_TRANSFORMER = {
    "bfloat16": 0.20,
    "bfloat16 compiled": 0.30,
    "tf32": 0.30,
    "tf32 compiled": 0.30,
    "float32": 0.60,
    "float32 compiled": 0.60,
    "core": 0.6,
}
UTILISATION: dict[Kind, dict[str, float]] = {
    "encode": {"float32": 0.30, "tf32": 0.30, "bfloat16": 0.20, "core": 0.4},
    "train": _TRANSFORMER,
    "evaluate": _TRANSFORMER,
    "features": {"float32": 0.30, "core": 0.25},
}
"""Shares of an accelerator's peak that work is assumed to reach, by dtype, where `rates` has none that was measured.
Under "core": shares of a CPU core's speed in square matrix products, where work takes too long to be measured;
about what DiT-S/2 and EfficientNet-Lite0 reach."""

StageConfig = AutoencoderTrainConfig | EncodeConfig | TrainConfig | EvaluateConfig
"""A recipe's settings of one stage."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Accelerators of one kind, or the CPU cores of this machine."""

    name: str
    """Key of ACCELERATORS, or "CPU core"."""
    count: int
    """Accelerators, or cores where there are none."""
    memory_bytes: float
    """Bytes of one accelerator, or of this machine where there are none."""
    accelerator: Accelerator | None = None
    cores: int
    """CPU cores in all."""
    dollars_per_hour: float | None = None
    """Price of one accelerator."""
    core_flops: float = 0.0
    """FLOPs per second of a core in products of float32 matrices, measured; 0 where there are accelerators."""
    speeds: dict[Kind, float] = field(default_factory=dict)
    """FLOPs per second of a core in float32 by kind of work, where they were measured (pipelines.planning.measure)."""
    bfloat16_gains: dict[Kind, float] = field(default_factory=dict)
    """How many times as fast a kind of work is in bfloat16 as in float32, where it was measured."""
    read_seconds: float = READ_SECONDS
    """Seconds of a core to read and crop one image, assumed or measured."""

    def speed(
        self, kind: Kind, workers: StageConfig, dtype: str = "float32", compiled: bool = False, width: int = 0
    ) -> tuple[float, str]:
        """Return the FLOPs per second that a stage's workers reach together, and what that rests on, in words.

        On accelerators float32 convolutions use TF32, and what has no units for a dtype computes in float32. CPUs have
        no TF32. width: of the transformer, if it computes.
        """
        if self.accelerator:
            speed, basis = self._device_speed(self.accelerator, kind, dtype, compiled, width)
            return workers.most_workers * min(1.0, workers.gpus_per_worker) * speed, basis
        if kind in self.speeds:
            flops = self.speeds[kind] * (self.bfloat16_gains.get(kind, 1.0) if dtype == "bfloat16" else 1.0)
            basis = f"measured: {flops / 1e9:,.1f} GFLOP/s of a core"
        else:
            share = UTILISATION[kind]["core"]
            flops = share * self.core_flops
            basis = f"assumed: {share:.0%} of a core's {self.core_flops / 1e9:,.0f} GFLOP/s"
        cores = min(workers.most_workers * workers.cpus_per_worker, self.cores)
        return flops * cores * (MULTICORE_EFFICIENCY if cores > 1 else 1), basis

    def _device_speed(
        self, accelerator: Accelerator, kind: Kind, dtype: str, compiled: bool, width: int
    ) -> tuple[float, str]:
        """Return the FLOPs per second of one accelerator, and what they rest on, in words."""
        has_units = getattr(accelerator, dtype) and not (dtype == "tf32" and accelerator.tf32 == accelerator.float32)
        if not has_units:
            dtype = "float32"
        units = "tf32" if kind == "encode" and dtype == "float32" else dtype
        peak = getattr(accelerator, units)
        units = "float32" if peak == accelerator.float32 else units
        precision = f"{dtype} compiled" if compiled else dtype
        measured = measured_share(self.name, kind, precision, width)
        share, basis = measured or (UTILISATION[kind][precision], "assumed")
        return share * peak, f"{basis}: {share:.0%} of {peak / 1e12:,.0f} TFLOP/s ({units})"

    def worker_bytes(self, workers: StageConfig) -> float:
        """Return the memory that one worker of a stage may take."""
        return self.memory_bytes * (min(1.0, workers.gpus_per_worker) if self.accelerator else 1 / workers.most_workers)


def parse_cluster(text: str, *, price: float | None = None) -> Cluster:
    """Return the cluster that a text such as "8xH100" names. Raises InvalidInput for another form or device.

    price: dollars per hour of one accelerator; an assumed list price if None.
    """
    match = re.fullmatch(r"([1-9]\d{0,9})\s*[x*]\s*(\S.*)", text.strip())
    if match is None:
        raise InvalidInput(f"--cluster: found {text!r}", "a number and a device, such as 8xH100 or 4xA10G", "Name both")
    count, name = int(match[1]), accelerator_named(match[2])
    accelerator = ACCELERATORS[name]
    return Cluster(
        name=name,
        count=count,
        memory_bytes=accelerator.memory_gib * 2**30,
        accelerator=accelerator,
        cores=count * CORES_PER_DEVICE,
        dollars_per_hour=accelerator.dollars_per_hour if price is None else price,
    )


def fit_workers(settings: StageConfig, cluster: Cluster, images: int) -> dict[str, Any]:
    """Return the changed fields of a stage's settings with which its workers use a cluster best.

    With accelerators a stage gets as many workers as divide its batch evenly or have a shard each, and each worker its
    share of an accelerator, of which a training's needs its own; without accelerators workers have none. images: how
    many the stage processes. Raises InvalidInput for a training in float8 without accelerators.
    """
    if cluster.accelerator is None:
        if isinstance(settings, TrainConfig) and settings.matmul == "float8":
            raise InvalidInput(
                "train.matmul: found 'float8', and a plan for this machine's CPU cores",
                "GPUs, because CPUs have no products in float8",
                "set --cluster, such as 8xH100, or remove train.matmul",
            )
        fitting: dict[str, Any] = {"gpus_per_worker": 0, "accelerator_type": None}
    else:
        gpus = settings.gpus_per_worker or 1
        if isinstance(settings, EncodeConfig | EvaluateConfig):
            most = count_fitting("GPU", cluster.count, gpus)  # several share one if gpus is below 1
            workers = max(1, min(most, math.ceil(images / settings.shard_rows)))
        else:
            gpus = max(1, gpus)
            workers = max(1, count_fitting("GPU", cluster.count, gpus))
            batch = settings.global_batch_size // settings.accumulation_steps
            workers = next(count for count in range(min(workers, batch), 0, -1) if batch % count == 0)
        fitting = {"gpus_per_worker": gpus, "num_workers": workers}
    return {name: value for name, value in fitting.items() if value != getattr(settings, name)}


def require_room(section: str, settings: StageConfig, cluster: Cluster) -> None:
    """Raise InvalidInput if the workers of a stage need more accelerators than a cluster has.

    section: the stage's table in the recipe, such as "autoencoder.train".
    """
    if cluster.accelerator is None:
        return
    workers, gpus = settings.most_workers, settings.gpus_per_worker
    most = count_fitting("GPU", cluster.count, gpus)
    if workers <= most:
        return
    field = "num_workers" if most else "gpus_per_worker"
    raise InvalidInput(
        f"{section}.{field}: found {workers} worker{'s' * (workers != 1)} of {gpus:g} GPU{'s' * (gpus != 1)}",
        f"at most {most or cluster.count} on {cluster.count}x{cluster.name}",
        f"lower {section}.{field}, or plan for more devices (--cluster)",
    )
