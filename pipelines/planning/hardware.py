"""The machines that a plan is for, how fast they are assumed to be, and a recipe's workers made to fill them."""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dit.accelerators import ACCELERATORS, Accelerator, accelerator_named
from pipelines.config.recipe import AutoencoderConfig, Recipe
from pipelines.config.training import ElasticWorkersConfig

NODE_DEVICES = 8
"""Accelerators of a node, an assumption."""
CORES_PER_DEVICE = 12
"""CPU cores of a node for each of its accelerators, an assumption."""
READ_SECONDS = 0.010
"""Of a core, to read a photograph of ImageNet's size and crop it; an assumption where nothing is measured."""
Kind = Literal["train", "sample", "reconstruct", "encode", "decode", "features"]
"""Kinds of arithmetic: the transformer with and without gradients, the autoencoder alike, the extractor."""
_TRANSFORMER = {"bfloat16": 0.20, "bfloat16 compiled": 0.30, "float32": 0.60, "float32 compiled": 0.60}
UTILISATION: dict[Kind, dict[str, float]] = {
    "train": _TRANSFORMER,
    "sample": _TRANSFORMER,
    "reconstruct": {"tf32": 0.30},
    "encode": {"tf32": 0.30, "bfloat16": 0.20},
    "decode": {"tf32": 0.30},
    "features": {"float32": 0.30},
}
"""Shares of an accelerator's peak that work is assumed to reach, by dtype."""
CPU_UTILISATION: dict[Kind, float] = {
    "train": 0.6,
    "sample": 0.6,
    "reconstruct": 0.4,
    "encode": 0.4,
    "decode": 0.4,
    "features": 0.25,
}
"""Of what a core reaches in the product of square matrices, for work that is too much to be measured: about what
DiT-S/2 and EfficientNet-Lite0 reach."""
TOGETHER = 0.8
"""Of their own speed, what several cores reach at once: they share caches, memory and units, and wait for each other.
Training steps of the digits' model by two workers: 54 ms, by one with as many images each: 45 ms."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Accelerators of one kind, or the cores of this machine."""

    name: str
    """Key of ACCELERATORS, or "CPU core"."""
    count: int
    """Accelerators, or cores."""
    memory_bytes: float
    """Of one accelerator; of the whole machine where there is none."""
    accelerator: Accelerator | None = None
    cores: int
    dollars_per_hour: float | None = None
    """Of one accelerator."""
    core_flops: float = 0.0
    """FLOPs per second of a core in products of float32 matrices, measured; where there is no accelerator."""
    speeds: dict[str, float] = field(default_factory=dict)
    """FLOPs per second of a core by kind of work, where they were measured (see pipelines.planning.measure)."""
    bfloat16_gains: dict[str, float] = field(default_factory=dict)
    """How many times as fast a stage's work is with `dtype = "bfloat16"` as with "float32", where it was measured."""
    read_seconds: float | None = None
    """Of a core, to read and crop one image; where it was measured."""

    def speed(self, kind: Kind, dtype: str = "float32", compiled: bool = False) -> float:
        """FLOPs per second that one device, or one core, is taken to reach."""
        if self.accelerator is not None:
            return self.peak(dtype) * UTILISATION[kind][f"{dtype} compiled" if compiled else dtype]
        return self.speeds.get(kind) or self.core_flops * CPU_UTILISATION[kind]

    def basis(self, kind: Kind, dtype: str = "float32", compiled: bool = False) -> str:
        """Where that is from, in words."""
        if self.accelerator is not None:
            share = UTILISATION[kind][f"{dtype} compiled" if compiled else dtype]
            slow = self.peak(dtype) == self.accelerator.float32
            return f"assumed: {share:.0%} of {self.peak(dtype) / 1e12:,.0f} TFLOP/s ({'float32' if slow else dtype})"
        if kind in self.speeds:
            return f"measured: {self.speeds[kind] / 1e9:,.1f} GFLOP/s of a core"
        return f"assumed: {CPU_UTILISATION[kind]:.0%} of a core's {self.core_flops / 1e9:,.0f} GFLOP/s"

    def peak(self, dtype: str) -> float:
        """FLOPs per second of one accelerator. bfloat16 without units for it is as fast as float32 at best."""
        assert self.accelerator is not None, "of accelerators only"
        return getattr(self.accelerator, dtype) or self.accelerator.float32

    def parallel(self, settings: ElasticWorkersConfig) -> float:
        """How many devices a stage's workers are worth, or how many cores."""
        if self.accelerator is None:
            cores = min(settings.most_workers * settings.cpus_per_worker, self.cores)
            return cores * TOGETHER if cores > 1 else cores
        return settings.most_workers * min(1.0, settings.gpus_per_worker)

    def worker_memory(self, settings: ElasticWorkersConfig) -> float:
        """Bytes that one worker may take."""
        if self.accelerator is None:
            return self.memory_bytes / settings.most_workers
        return self.memory_bytes * min(1.0, settings.gpus_per_worker)

    @property
    def devices_per_node(self) -> int:
        return min(self.count, NODE_DEVICES)


def parse_cluster(text: str, price: float | None = None) -> Cluster:
    """ "8xH100" -> eight of them. Raises ValueError for an unknown device or another form."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x*]\s*(\S.*?)\s*", text)
    if match is None:
        raise ValueError(f"--cluster: found {text!r}, expected a number and a device, such as 8xH100 or 4xA10G")
    count, name = int(match[1]), accelerator_named(match[2])
    return accelerators(name, count, price=price, cores=count * CORES_PER_DEVICE)


def accelerators(name: str, count: int, *, cores: int, price: float | None = None) -> Cluster:
    """Some of one kind."""
    accelerator = ACCELERATORS[name]
    return Cluster(
        name=name,
        count=count,
        memory_bytes=accelerator.memory_gib * 2**30,
        accelerator=accelerator,
        cores=cores,
        dollars_per_hour=accelerator.dollars_per_hour if price is None else price,
    )


def this_machine() -> Cluster:
    """Its accelerators, if it has known ones; else its cores, whose speed is measured. Imports torch."""
    import torch

    from dit.devices import measured_flops

    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        if known := next((key for key in ACCELERATORS if key in name), None):
            return accelerators(known, torch.cuda.device_count(), cores=cores, price=0.0)
    torch.set_num_threads(1)
    return Cluster(
        name="CPU core",
        count=cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=cores,
        core_flops=measured_flops(torch.device("cpu"), torch.float32),
    )


def filled(config: Recipe, cluster: Cluster, kept: frozenset[str], shards: dict[str, int]) -> tuple[Recipe, list[str]]:
    """The recipe as the cluster runs it, and the overrides that make it so.

    Where there are accelerators a stage gets as many workers as there are, each with one; without, none has one.
    kept: dotted fields that the user has set and that stay. shards: how many workers a stage can use at most. Raises
    ValueError if what is kept leaves the accelerators out.
    """
    overrides: list[str] = []

    def sized(stage: str, settings: Any) -> Any:
        changes: dict[str, Any] = {"gpus_per_worker": 0}
        if cluster.accelerator:
            share = settings.gpus_per_worker or 1
            workers = _most_workers(settings, int(cluster.count / min(1, share)), shards.get(stage))
            changes = {"gpus_per_worker": share, "num_workers": workers}
        changes = {name: value for name, value in changes.items() if f"{stage}.{name}" not in kept}
        changes = {name: value for name, value in changes.items() if value != getattr(settings, name)}
        overrides.extend(f"{stage}.{name}={value:g}" for name, value in changes.items())
        settings = replace(settings, **changes)
        if bool(settings.gpus_per_worker) != bool(cluster.accelerator):
            raise ValueError(
                f"{stage}.gpus_per_worker: found {settings.gpus_per_worker:g} for {cluster.count} x {cluster.name}; "
                f"expected {'1' if cluster.accelerator else '0'}: leave it out of --set"
            )
        return settings

    own = config.autoencoder.train
    autoencoder = config.autoencoder if own is None else AutoencoderConfig(train=sized("autoencoder.train", own))
    parts = {stage: sized(stage, getattr(config, stage)) for stage in ("encode", "train", "evaluate")}
    return replace(config, autoencoder=autoencoder, **parts), overrides


def _most_workers(settings: Any, count: int, shards: int | None) -> int:
    """Of at most `count`, as many as share a batch evenly, or as there are shards."""
    if shards is not None:
        return max(1, min(count, shards))
    passes = settings.global_batch_size // settings.accumulation_steps
    return next(workers for workers in range(min(count, passes), 0, -1) if passes % workers == 0)
