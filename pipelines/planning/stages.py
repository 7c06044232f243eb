"""One stage of a recipe on a cluster: arithmetic, memory of a worker, time, and what to change where it does not fit.

No stage counts what an earlier run has finished, nor the wait for a machine.
"""

import math
from dataclasses import dataclass

from dit.config import DiTConfig, UViTConfig
from dit.macs import forward_macs
from dit.schedule import TrainingConfig
from evaluation.extractors import extractor_macs
from pipelines.config.recipe import EvaluateConfig
from pipelines.config.training import ElasticWorkersConfig
from pipelines.planning.hardware import READ_SECONDS, Cluster, Kind
from pipelines.planning.memory import Subject, smaller, worker_memory
from pipelines.planning.time import StepSeconds, step_seconds, training_flops

TRAIN_START_SECONDS = 25.0
"""Of a stage of Ray Train before its first step: processes, torch, the process group. Seen on two CPU cores."""
DATA_START_SECONDS = 12.0
"""Of encode or evaluate before its first image: processes, torch, the weights. Seen on two CPU cores."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs and takes."""

    stage: str
    work: str
    images: int
    """Images that go through; in training those of every step."""
    flops: float
    workers: int
    memory: dict[str, float]
    """Bytes of one worker, by what they hold."""
    memory_limit: float
    """Bytes that one worker may take."""
    seconds: float
    limit: str
    """What takes most of the time."""
    basis: str
    """Where the speed is from."""
    advice: str = ""
    """What to change where it does not fit."""
    step: StepSeconds | None = None
    """Of a training step on accelerators."""

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.memory_limit


def plan_autoencoder(subject: Subject) -> StagePlan:
    """Training of the recipe's own autoencoder."""
    settings, cluster = subject.config.autoencoder.train, subject.cluster
    assert settings is not None, "asked for only where one is trained"
    count = settings.steps * settings.global_batch_size
    flops = count * 6 * (subject.encoder.macs + subject.decoder.macs)
    return _planned(
        subject,
        settings,
        stage="autoencoder",
        work=f"{settings.steps:,} steps of {settings.global_batch_size:,} images",
        images=count,
        flops=flops,
        seconds=flops / _rate(cluster, settings, "reconstruct", "tf32"),
        basis=cluster.basis("reconstruct", "tf32"),
    )


def plan_encode(subject: Subject) -> StagePlan:
    """Images to moments."""
    settings, cluster, count = subject.config.encode, subject.cluster, subject.images
    flops = count * 2 * subject.encoder.macs * (1 + settings.flip)
    dtype = "bfloat16" if settings.dtype == "bfloat16" else "tf32"
    # The last pass of a shard is filled up.
    full = math.ceil(settings.shard_rows / settings.batch_size) * settings.batch_size / settings.shard_rows
    encoding = full * flops / _rate(cluster, settings, "encode", dtype)
    reading = _read(cluster, count) / cluster.cores
    return _planned(
        subject,
        settings,
        stage="encode",
        work=f"{count:,} images{' and their mirrors' if settings.flip else ''}",
        images=count,
        flops=flops,
        # Where an accelerator encodes, cores read meanwhile; without one they do both.
        seconds=max(encoding, reading) if cluster.accelerator else encoding + reading,
        limit="reading images" if reading > encoding else "arithmetic",
        basis=cluster.basis("encode", dtype),
    )


def plan_train(subject: Subject) -> StagePlan:
    """Training of the transformer."""
    settings, cluster = subject.config.train, subject.cluster
    count = settings.steps * settings.global_batch_size
    flops, step = count * training_flops(subject.model), None
    if cluster.accelerator:
        step = step_seconds(
            subject.model,
            settings,
            cluster.accelerator,
            flops_per_second=cluster.speed("train", settings.dtype, settings.compile),
            workers=settings.most_workers,
            workers_per_node=cluster.devices_per_node,
            strategy=settings.strategy,
        )
        seconds = settings.steps * step.total
    else:
        again = 4 / 3 if settings.gradient_checkpointing else 1
        seconds = flops * again / _rate(cluster, settings, "train")
    return _planned(
        subject,
        settings,
        stage="train",
        work=f"{settings.steps:,} steps of {settings.global_batch_size:,} images",
        images=count,
        flops=flops,
        seconds=seconds,
        limit="exchange of gradients" if step and step.exchange > step.backward else "arithmetic",
        basis=cluster.basis("train", settings.dtype, settings.compile),
        step=step,
    )


def plan_evaluate(subject: Subject) -> StagePlan:
    """Sampling, decoding, features of samples and of real images; not the metrics' own arithmetic."""
    settings, cluster = subject.config.evaluate, subject.cluster
    images = settings.num_samples + subject.scored
    flops = {
        "sampling": settings.num_samples * sampling_flops(subject.model, settings),
        "decoding": settings.num_samples * 2 * subject.decoder.macs,
        "features": images * 2 * extractor_macs(settings.extractor),
    }
    seconds = {
        "sampling": flops["sampling"] / _rate(cluster, settings, "sample", settings.dtype, settings.compile),
        "decoding": flops["decoding"] / _rate(cluster, settings, "decode", "tf32"),
        "features": flops["features"] / _rate(cluster, settings, "features"),
        # An actor reads the real images that it scores, on one core.
        "reading images": _read(cluster, subject.scored) / min(settings.num_workers, cluster.cores),
    }
    real = f", {subject.scored:,} real images" if subject.scored else ""
    return _planned(
        subject,
        settings,
        stage="evaluate",
        work=f"{settings.num_samples:,} samples of {settings.sampling_steps:,} steps{real}",
        images=images,
        flops=sum(flops.values()),
        seconds=sum(seconds.values()),
        limit=max(seconds, key=lambda name: seconds[name]),
        basis=cluster.basis("sample", settings.dtype, settings.compile),
    )


def sampling_flops(model: DiTConfig | UViTConfig, settings: EvaluateConfig) -> int:
    """FLOPs of the network for one sample; guidance doubles them, inside its interval if it has one: counted always."""
    calls = settings.sampling_steps * (2 if settings.sampler == "heun" else 1) * (2 if settings.cfg_scale > 1 else 1)
    return 2 * forward_macs(model) * calls


def _planned(
    subject: Subject,
    settings: ElasticWorkersConfig,
    *,
    stage: str,
    work: str,
    images: int,
    flops: float,
    seconds: float,
    basis: str,
    limit: str = "arithmetic",
    step: StepSeconds | None = None,
) -> StagePlan:
    """The plan of a stage, with its memory, and what to change where that is not enough."""
    memory = worker_memory(subject, settings)
    room = subject.cluster.worker_memory(settings)
    start = TRAIN_START_SECONDS if isinstance(settings, TrainingConfig) else DATA_START_SECONDS
    return StagePlan(
        stage=stage,
        work=work,
        images=images,
        flops=flops,
        workers=settings.most_workers,
        memory=memory,
        memory_limit=room,
        seconds=start + seconds,
        limit=limit,
        basis=basis,
        advice=smaller(subject, settings, stage, room) if sum(memory.values()) > room else "",
        step=step,
    )


def _rate(
    cluster: Cluster, settings: ElasticWorkersConfig, kind: Kind, dtype: str = "float32", compiled: bool = False
) -> float:
    """FLOPs per second of a stage's workers."""
    return cluster.speed(kind, dtype, compiled) * cluster.parallel(settings)


def _read(cluster: Cluster, images: int) -> float:
    """Seconds of one core."""
    return images * (READ_SECONDS if cluster.read_seconds is None else cluster.read_seconds)
