"""Plans of single stages on a cluster: arithmetic, time, memory of a worker, and what to change if it is too much.

A plan counts all of a stage's work, also what an earlier run has finished, and no waiting for machines.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dit.config import DiTConfig, UViTConfig
from dit.macs import forward_macs
from evaluation.extractors import extractor_macs
from pipelines.config.recipe import EncodeConfig, EvaluateConfig
from pipelines.config.training import AutoencoderTrainConfig, TrainConfig
from pipelines.planning.hardware import NODE_DEVICES, Cluster, Settings
from pipelines.planning.memory import (
    Memory,
    autoencoder_memory,
    encode_memory,
    evaluate_memory,
    suggest_smaller,
    train_memory,
)
from pipelines.planning.networks import Networks
from pipelines.planning.time import StepSeconds, step_seconds, training_flops

TRAIN_START_SECONDS = 25.0
"""Seconds of a training stage before its first step: processes, torch, process group; measured on two CPU cores."""
DATA_START_SECONDS = 12.0
"""Seconds of encode or evaluate before the first image: processes, torch, weights; measured on two CPU cores."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs and how long it takes."""

    stage: str
    work: str
    """The amount of work, in words."""
    images: int
    """Images that the stage processes; a training counts those of every step."""
    flops: float
    workers: int
    memory: Memory = field(default_factory=dict)
    memory_limit: float = 0.0
    """Bytes that one worker may take."""
    seconds: float
    limit: str
    """What takes most of the time."""
    basis: str
    """What the speed rests on, in words."""
    advice: str = ""
    """What to change if a worker takes more memory than it may."""
    step: StepSeconds | None = None
    """One training step on accelerators."""

    @property
    def memory_bytes(self) -> float:
        """Bytes that one worker takes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a worker takes no more memory than it may."""
        return self.memory_bytes <= self.memory_limit


def plan_autoencoder_stage(settings: AutoencoderTrainConfig, networks: Networks, cluster: Cluster) -> StagePlan:
    """Plan the training of a recipe's own autoencoder."""
    images = settings.steps * settings.global_batch_size
    flops, speed = images * 6 * (networks.encoder.macs + networks.decoder.macs), cluster.speed("reconstruct", "tf32")
    plan = StagePlan(
        stage="autoencoder",
        work=f"{settings.steps:,} steps of {settings.global_batch_size:,} images",
        images=images,
        flops=flops,
        workers=settings.num_workers,
        seconds=TRAIN_START_SECONDS + flops / (speed.flops * cluster.parallelism(settings)),
        limit="arithmetic",
        basis=speed.basis,
    )
    return _with_memory(plan, settings, cluster, lambda changed: autoencoder_memory(networks, changed))


def plan_encode_stage(settings: EncodeConfig, networks: Networks, cluster: Cluster, *, images: int) -> StagePlan:
    """Plan the encoding of images, and of their horizontal flips if the recipe stores those."""
    flops = images * 2 * networks.encoder.macs * (1 + settings.flip)
    speed = cluster.speed("encode", "bfloat16" if settings.dtype == "bfloat16" else "tf32")
    # The last batch of a shard is padded.
    padded = math.ceil(settings.shard_rows / settings.batch_size) * settings.batch_size / settings.shard_rows
    encoding = padded * flops / (speed.flops * cluster.parallelism(settings))
    reading = images * cluster.seconds_to_read / cluster.cores
    plan = StagePlan(
        stage="encode",
        work=f"{images:,} images{' and their horizontal flips' if settings.flip else ''}",
        images=images,
        flops=flops,
        workers=settings.num_workers,
        # Cores read while accelerators encode; without accelerators they do both.
        seconds=DATA_START_SECONDS + (max(encoding, reading) if cluster.accelerator else encoding + reading),
        limit="reading images" if reading > encoding else "arithmetic",
        basis=speed.basis,
    )
    return _with_memory(plan, settings, cluster, lambda changed: encode_memory(networks, changed))


def plan_train_stage(settings: TrainConfig, networks: Networks, cluster: Cluster) -> StagePlan:
    """Plan the training of the transformer."""
    images = settings.steps * settings.global_batch_size
    flops, speed = images * training_flops(networks.model), cluster.speed("train", settings.dtype, settings.compile)
    if cluster.accelerator:
        nodes = min(cluster.count, NODE_DEVICES)
        step = step_seconds(networks.model, settings, cluster.accelerator, speed.flops, workers_per_node=nodes)
        seconds = settings.steps * step.total
    else:
        step, recomputed = None, 4 / 3 if settings.gradient_checkpointing else 1
        seconds = flops * recomputed / (speed.flops * cluster.parallelism(settings))
    plan = StagePlan(
        stage="train",
        work=f"{settings.steps:,} steps of {settings.global_batch_size:,} images",
        images=images,
        flops=flops,
        workers=settings.most_workers,
        seconds=TRAIN_START_SECONDS + seconds,
        limit="gradient all-reduce" if step and step.all_reduce > step.backward else "arithmetic",
        basis=speed.basis,
        step=step,
    )
    return _with_memory(plan, settings, cluster, lambda changed: train_memory(networks.model, changed))


def plan_evaluate_stage(
    settings: EvaluateConfig, networks: Networks, cluster: Cluster, *, real_images: int
) -> StagePlan:
    """Plan sampling, decoding, and the features of samples and real images, without the metrics' own arithmetic."""
    samples, images, workers = settings.num_samples, settings.num_samples + real_images, cluster.parallelism(settings)
    sampling_speed = cluster.speed("sample", settings.dtype, settings.compile)
    work = {
        "sampling": (samples * sampling_flops(networks.model, settings), sampling_speed),
        "decoding": (samples * 2 * networks.decoder.macs, cluster.speed("decode", "tf32")),
        "features": (images * 2 * extractor_macs(settings.extractor), cluster.speed("features")),
    }
    seconds = {name: flops / (speed.flops * workers) for name, (flops, speed) in work.items()}
    # Each worker reads the real images that it scores on one core.
    seconds["reading images"] = real_images * cluster.seconds_to_read / min(settings.num_workers, cluster.cores)
    real = f", {real_images:,} real images" if real_images else ""
    plan = StagePlan(
        stage="evaluate",
        work=f"{samples:,} samples of {settings.sampling_steps:,} steps{real}",
        images=images,
        flops=sum(flops for flops, _ in work.values()),
        workers=settings.num_workers,
        seconds=DATA_START_SECONDS + sum(seconds.values()),
        limit=max(seconds, key=lambda name: seconds[name]),
        basis=sampling_speed.basis,
    )
    return _with_memory(plan, settings, cluster, lambda changed: evaluate_memory(networks, changed))


def sampling_flops(model: DiTConfig | UViTConfig, settings: EvaluateConfig) -> int:
    """Return the network's FLOPs for one sample. Guidance doubles them, here also outside of its interval."""
    calls = settings.sampling_steps * (2 if settings.sampler == "heun" else 1) * (2 if settings.cfg_scale > 1 else 1)
    return 2 * forward_macs(model) * calls


def _with_memory(
    plan: StagePlan, settings: Settings, cluster: Cluster, memory: Callable[[Settings], Memory]
) -> StagePlan:
    """Return a stage's plan with the memory of a worker, and with advice if that is more than the worker may take."""

    def with_process(settings: Settings) -> Memory:
        return memory(settings) | {"process": cluster.process_bytes}

    plan = replace(plan, memory=with_process(settings), memory_limit=cluster.worker_bytes(settings))
    if plan.fits:
        return plan
    section = "autoencoder.train" if plan.stage == "autoencoder" else plan.stage
    return replace(plan, advice=suggest_smaller(settings, section, with_process, plan.memory_limit))
