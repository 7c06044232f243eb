"""The memory that a worker of each stage takes, and which settings take less."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dit.autoencoder_size import AutoencoderSize
from dit.config import DiTConfig, UViTConfig
from pipelines.config.recipe import EncodeConfig, EvaluateConfig
from pipelines.config.training import AutoencoderTrainConfig, TrainConfig
from pipelines.planning.hardware import Settings
from pipelines.planning.networks import Networks
from pipelines.planning.sizes import FLOAT32, NUMBER_BYTES, activation_bytes, count_parameters, sampling_bytes

INFERENCE_MAPS = 3
"""Feature maps of full resolution that an autoencoder holds at once without gradients: input, norm, activation."""
SAVED_MAPS = 2.6
"""Feature maps that training an autoencoder keeps for the backward pass, per convolution; measured in torch."""

Memory = dict[str, float]
"""Bytes of one worker, by what they hold."""


def train_memory(model: DiTConfig | UViTConfig, settings: TrainConfig) -> Memory:
    """Return the memory of a worker that trains the transformer.

    "moments" are AdamW's two, "gathered" the blocks that FSDP has in one piece while they compute. "activations" is an
    estimate of what is kept for the backward pass; compiled networks keep less.
    """
    model = replace(model, gradient_checkpointing=settings.gradient_checkpointing)
    counts = count_parameters(model)
    shards = settings.most_workers if settings.strategy == "fsdp" else 1
    gathered = FLOAT32 * (counts.total - (model.depth - 3) * counts.block) if shards > 1 else 0
    # Autocast keeps a copy of every weight until the backward pass is done.
    casts = 2 * counts.trained if settings.dtype == "bfloat16" and not settings.gradient_checkpointing else 0
    return {
        "weights": FLOAT32 * counts.total / shards,
        "gradients": FLOAT32 * counts.trained / shards,
        "moments": 2 * FLOAT32 * counts.trained / shards,
        "averages": FLOAT32 * (1 + len(settings.ema_sigma_rels)) * counts.total / shards,
        "gathered": max(0, gathered),
        "activations": _micro_batch(settings) * activation_bytes(model, settings.dtype) + casts,
    }


def autoencoder_memory(networks: Networks, settings: AutoencoderTrainConfig) -> Memory:
    """Return the memory of a worker that trains the autoencoder: state, which is five copies of it, and activations."""
    parameters = networks.encoder.parameters + networks.decoder.parameters
    maps = SAVED_MAPS * FLOAT32 * (networks.encoder.elements + networks.decoder.elements)
    return {"state": 5 * FLOAT32 * parameters, "activations": maps * _micro_batch(settings)}


def encode_memory(networks: Networks, settings: EncodeConfig) -> Memory:
    """Return the memory of a worker that encodes images."""
    return _inference_memory(networks.encoder, settings.batch_size, settings.dtype)


def evaluate_memory(networks: Networks, settings: EvaluateConfig) -> Memory:
    """Return the memory of a worker that samples and decodes; guidance runs twice as many images at once."""
    images = settings.batch_size * (2 if settings.cfg_scale > 1 else 1)
    return _inference_memory(networks.decoder, settings.batch_size) | {
        "network": FLOAT32 * count_parameters(networks.model).total,
        "tokens": images * sampling_bytes(networks.model, settings.dtype),
    }


def _inference_memory(half: AutoencoderSize, batch_size: int, dtype: str = "float32") -> Memory:
    size = NUMBER_BYTES[dtype]
    return {"autoencoder": size * half.parameters, "feature maps": INFERENCE_MAPS * size * half.largest * batch_size}


def _micro_batch(settings: TrainConfig | AutoencoderTrainConfig) -> int:
    """Return the images that a worker has in one forward and backward pass."""
    return math.ceil(settings.global_batch_size / settings.most_workers / settings.accumulation_steps)


def suggest_smaller(settings: Settings, section: str, memory: Callable[[Settings], Memory], limit: float) -> str:
    """Return the cheapest change of settings with which a worker takes at most `limit` bytes, as flags.

    section: the recipe's table of these settings, such as "autoencoder.train".
    """
    for changed, change in _smaller_settings(settings):
        taken = sum(memory(changed).values())
        if taken <= limit:
            flags = " ".join(f"--set {section}.{name}={_toml(value)}" for name, value in change.items())
            return f"{flags} takes {taken / 2**30:.1f} GiB"
    return "no setting is enough; take devices with more memory, or a smaller model or image size"


def _smaller_settings(settings: Settings) -> Iterator[tuple[Settings, dict[str, Any]]]:
    """Yield settings that take less memory with their changed fields, the cheapest change first."""
    changes: list[dict[str, Any]]
    if isinstance(settings, EncodeConfig | EvaluateConfig):
        changes = [{"batch_size": settings.batch_size >> power} for power in range(1, settings.batch_size.bit_length())]
    else:
        assert isinstance(settings, TrainConfig | AutoencoderTrainConfig), "a recipe has four stages"
        changes = [{"accumulation_steps": settings.accumulation_steps * 2**power} for power in range(1, 8)]
    if isinstance(settings, TrainConfig):
        # Tiny micro-batches use a device badly: recompute activations before that, then shard the state.
        recompute: dict[str, Any] = {"gradient_checkpointing": True}
        shard = recompute | ({"strategy": "fsdp"} if settings.most_workers > 1 else {})
        few = changes[:2]
        changes = [*few, *(recompute | more for more in ({}, *few)), *(shard | more for more in ({}, *changes))]
    for change in changes:
        change = {name: value for name, value in change.items() if value != getattr(settings, name)}
        try:
            yield replace(settings, **change), change
        except ValueError:  # more micro-batches than a worker has images
            continue


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
