"""What memory a worker of each stage takes, and which settings take less."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dit.autoencoder_size import AutoencoderSize
from dit.config import DiTConfig, UViTConfig
from pipelines.config.recipe import EncodeConfig, EvaluateConfig, Recipe
from pipelines.config.training import AutoencoderTrainConfig, ElasticWorkersConfig, TrainConfig
from pipelines.planning.hardware import Cluster
from pipelines.planning.sizes import FLOAT32, count_parameters, sampling_bytes, training_memory

ACCELERATOR_BYTES = 2 * 2**30
"""Of a worker on an accelerator beside its tensors: context, libraries, fragments; an assumption."""
PROCESS_BYTES = 600 * 2**20
"""Of a worker on a CPU beside its tensors: torch."""
KEPT_MAPS = 3
"""Feature maps of full resolution that a pass without gradients holds at once: input, norm, activation."""
SAVED_MAPS = 2.6
"""Feature maps that training an autoencoder keeps for backward, for each convolution; as torch keeps them."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the plans of a recipe's stages are made from."""

    config: Recipe
    cluster: Cluster
    images: int
    """To encode."""
    scored: int
    """Real images whose features are computed."""
    model: DiTConfig | UViTConfig
    encoder: AutoencoderSize
    decoder: AutoencoderSize


def worker_memory(subject: Subject, settings: ElasticWorkersConfig) -> dict[str, float]:
    """Bytes of one worker of the stage whose settings these are, by what they hold."""
    beside = {"process": ACCELERATOR_BYTES if subject.cluster.accelerator else PROCESS_BYTES}
    if isinstance(settings, EncodeConfig):
        return _inference(subject.encoder, settings.batch_size, settings.dtype) | beside
    if isinstance(settings, EvaluateConfig):
        at_once = settings.batch_size * (2 if settings.cfg_scale > 1 else 1)
        network = FLOAT32 * count_parameters(subject.model).total
        sampling = {"network": network, "tokens": at_once * sampling_bytes(subject.model, settings.dtype)}
        return _inference(subject.decoder, settings.batch_size) | sampling | beside
    if isinstance(settings, TrainConfig):
        return _training(subject, settings) | beside
    assert isinstance(settings, AutoencoderTrainConfig), "there are four stages"
    maps = SAVED_MAPS * FLOAT32 * (subject.encoder.elements + subject.decoder.elements)
    state = 5 * FLOAT32 * (subject.encoder.parameters + subject.decoder.parameters)
    return {"state": state, "activations": maps * _images_of_a_pass(settings)} | beside


def _inference(size: AutoencoderSize, batch: int, dtype: str = "float32") -> dict[str, float]:
    number = 2 if dtype == "bfloat16" else FLOAT32
    return {"autoencoder": number * size.parameters, "feature maps": KEPT_MAPS * number * size.largest * batch}


def _training(subject: Subject, settings: TrainConfig) -> dict[str, float]:
    return training_memory(
        replace(subject.model, gradient_checkpointing=settings.gradient_checkpointing),
        settings,
        images=_images_of_a_pass(settings),
        dtype=settings.dtype,
        shards=settings.most_workers if settings.strategy == "fsdp" else 1,
    )._asdict()


def _images_of_a_pass(settings: TrainConfig | AutoencoderTrainConfig) -> int:
    return math.ceil(settings.global_batch_size / settings.most_workers / settings.accumulation_steps)


def smaller(subject: Subject, settings: ElasticWorkersConfig, stage: str, limit: float) -> str:
    """What to change so that a worker takes no more than `limit` bytes: the cheapest change that is enough."""
    section = "autoencoder.train" if stage == "autoencoder" else stage
    for changed, change in _smaller(settings):
        memory = sum(worker_memory(subject, changed).values())
        if memory <= limit:
            flags = " ".join(f"--set {section}.{name}={_toml(value)}" for name, value in change.items())
            return f"{flags} takes {memory / 2**30:.1f} GiB"
    return "no setting is enough: take devices with more memory, or a smaller model or image"


def _smaller(settings: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Settings that take less memory, and what is changed in them; the cheapest change first."""
    changes: list[dict[str, Any]]
    if isinstance(settings, EncodeConfig | EvaluateConfig):
        changes = [{"batch_size": settings.batch_size >> power} for power in range(1, settings.batch_size.bit_length())]
    else:
        changes = [{"accumulation_steps": settings.accumulation_steps * 2**power} for power in range(1, 8)]
    if isinstance(settings, TrainConfig):
        # Passes of very few images use a device badly: before those, compute again, then divide the state.
        spared: dict[str, Any] = {"gradient_checkpointing": True}
        sharded: dict[str, Any] = spared | ({"strategy": "fsdp"} if settings.most_workers > 1 else {})
        few = changes[:2]
        changes = [*few, spared, *(spared | parts for parts in few), sharded, *(sharded | parts for parts in changes)]
    for change in changes:
        change = {name: value for name, value in change.items() if value != getattr(settings, name)}
        try:
            yield replace(settings, **change), change
        except ValueError:  # more passes than a worker has images
            continue


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
