"""The hardware that a plan is for, the speed that it is assumed or measured to have, and workers that fit it."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from dit.accelerators import ACCELERATORS, Accelerator, accelerator_named
from pipelines.config.recipe import AutoencoderConfig, Recipe
from pipelines.config.training import AutoencoderTrainConfig, ElasticWorkersConfig, TrainConfig
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
ACCELERATOR_PROCESS_BYTES = 2 * 2**30
"""Bytes of a worker on an accelerator besides its tensors (context, libraries, fragments), an assumption."""
CPU_PROCESS_BYTES = 600 * 2**20
"""Bytes of a worker on CPUs besides its tensors: torch."""
Kind = Literal["train", "sample", "reconstruct", "encode", "decode", "features"]
"""Kinds of arithmetic: the transformer with and without gradients, the autoencoder with gradients and its two halves
without, and the feature extractor."""
_TRANSFORMER = {"bfloat16": 0.20, "bfloat16 compiled": 0.30, "float32": 0.60, "float32 compiled": 0.60, "core": 0.6}
_AUTOENCODER = {"tf32": 0.30, "bfloat16": 0.20, "core": 0.4}
UTILISATION: dict[Kind, dict[str, float]] = {
    "train": _TRANSFORMER,
    "sample": _TRANSFORMER,
    "reconstruct": _AUTOENCODER,
    "encode": _AUTOENCODER,
    "decode": _AUTOENCODER,
    "features": {"float32": 0.30, "core": 0.25},
}
"""Shares of an accelerator's peak that work is assumed to reach, by dtype. Under "core": shares of a CPU core's
speed in products of square matrices, where work takes too long to be measured; about what DiT-S/2 and
EfficientNet-Lite0 reach."""

Settings = TypeVar("Settings", bound=ElasticWorkersConfig)


class Speed(NamedTuple):
    """What one accelerator or core reaches in one kind of work."""

    flops: float
    """FLOPs per second."""
    basis: str
    """What that rests on, in words."""


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
    speeds: dict[str, float] = field(default_factory=dict)
    """FLOPs per second of a core by kind of work, where they were measured (pipelines.planning.measure)."""
    bfloat16_gains: dict[str, float] = field(default_factory=dict)
    """How many times as fast a stage is with `dtype = "bfloat16"` as with "float32", where it was measured."""
    read_seconds: float | None = None
    """Seconds of a core to read and crop one image, where they were measured."""

    def speed(self, kind: Kind, dtype: str = "float32", compiled: bool = False) -> Speed:
        """Return what one accelerator or core is taken to reach. An accelerator without bfloat16 units uses float32."""
        if self.accelerator is None:
            if kind in self.speeds:
                return Speed(self.speeds[kind], f"measured: {self.speeds[kind] / 1e9:,.1f} GFLOP/s of a core")
            share = UTILISATION[kind]["core"]
            basis = f"assumed: {share:.0%} of a core's {self.core_flops / 1e9:,.0f} GFLOP/s"
            return Speed(self.core_flops * share, basis)
        share = UTILISATION[kind][f"{dtype} compiled" if compiled else dtype]
        peak = getattr(self.accelerator, dtype) or self.accelerator.float32
        units = "float32" if peak == self.accelerator.float32 else dtype
        return Speed(peak * share, f"assumed: {share:.0%} of {peak / 1e12:,.0f} TFLOP/s ({units})")

    def parallelism(self, settings: ElasticWorkersConfig) -> float:
        """Return how many times the speed of one accelerator or core a stage's workers reach together."""
        if self.accelerator is None:
            cores = min(settings.most_workers * settings.cpus_per_worker, self.cores)
            return cores * MULTICORE_EFFICIENCY if cores > 1 else cores
        return settings.most_workers * min(1.0, settings.gpus_per_worker)

    def worker_bytes(self, settings: ElasticWorkersConfig) -> float:
        """Return the memory that one worker of a stage may take."""
        if self.accelerator is None:
            return self.memory_bytes / settings.most_workers
        return self.memory_bytes * min(1.0, settings.gpus_per_worker)

    @property
    def seconds_to_read(self) -> float:
        """Seconds of a core to read and crop one image, measured or assumed."""
        return READ_SECONDS if self.read_seconds is None else self.read_seconds

    @property
    def process_bytes(self) -> int:
        """Bytes of a worker besides its tensors."""
        return ACCELERATOR_PROCESS_BYTES if self.accelerator else CPU_PROCESS_BYTES


def parse_cluster(text: str, *, price: float | None = None, cores: int | None = None) -> Cluster:
    """Return the cluster that a text such as "8xH100" names. Raises InvalidInput for another form or device.

    price: dollars per hour of one accelerator; an assumed list price if None. cores: CPU cores in all; assumed if None.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x*]\s*(\S.*?)\s*", text)
    if match is None:
        raise InvalidInput(f"--cluster: found {text!r}", "a number and a device, such as 8xH100 or 4xA10G", "Name both")
    count, name = int(match[1]), accelerator_named(match[2])
    accelerator = ACCELERATORS[name]
    return Cluster(
        name=name,
        count=count,
        memory_bytes=accelerator.memory_gib * 2**30,
        accelerator=accelerator,
        cores=count * CORES_PER_DEVICE if cores is None else cores,
        dollars_per_hour=accelerator.dollars_per_hour if price is None else price,
    )


def fit_workers(
    config: Recipe, cluster: Cluster, shards: dict[str, int], keep: frozenset[str] = frozenset()
) -> tuple[Recipe, list[str]]:
    """Give each stage of a recipe the workers that use a cluster best; return the recipe and the overrides for that.

    With accelerators a stage gets as many workers as it can use, each with its share of one; without, workers have
    none. shards: how many workers a stage without training can use. keep: dotted fields that must not change. Raises
    InvalidInput if those leave the accelerators unused, or ask for some where there are none.
    """
    overrides: list[str] = []

    def fit(section: str, settings: Settings) -> Settings:
        gpus = (settings.gpus_per_worker or 1) if cluster.accelerator else 0
        changes: dict[str, Any] = {"gpus_per_worker": gpus}
        if cluster.accelerator:
            changes["num_workers"] = _num_workers(settings, int(cluster.count / min(1, gpus)), shards.get(section))
        for name, value in changes.items():
            if f"{section}.{name}" not in keep and value != getattr(settings, name):
                settings = replace(settings, **{name: value})
                overrides.append(f"{section}.{name}={value:g}")
        if bool(settings.gpus_per_worker) != bool(cluster.accelerator):
            raise InvalidInput(
                f"{section}.gpus_per_worker: found {settings.gpus_per_worker:g} for {cluster.count} x {cluster.name}",
                "1" if cluster.accelerator else "0",
                "Leave it out of --set",
            )
        return settings

    own = config.autoencoder.train
    return replace(
        config,
        autoencoder=AutoencoderConfig(train=fit("autoencoder.train", own)) if own else config.autoencoder,
        encode=fit("encode", config.encode),
        train=fit("train", config.train),
        evaluate=fit("evaluate", config.evaluate),
    ), overrides


def _num_workers(settings: ElasticWorkersConfig, available: int, shards: int | None) -> int:
    """Return how many of the available workers divide a batch evenly, or have at least one shard each."""
    if isinstance(settings, TrainConfig | AutoencoderTrainConfig):
        images = settings.global_batch_size // settings.accumulation_steps
        return next(workers for workers in range(min(available, images), 0, -1) if images % workers == 0)
    assert shards is not None, "a stage that does not train divides its work into shards"
    return max(1, min(available, shards))
