"""The memory that a worker of each stage takes, and which settings take less."""

import math
from dataclasses import replace
from typing import Any

from dit.autoencoders.size import AutoencoderSize
from dit.config import DiTConfig, UViTConfig
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import TrainConfig
from pipelines.planning.activations import NUMBER_BYTES, activation_bytes, cast_bytes
from pipelines.planning.hardware import Cluster, StageConfig
from pipelines.planning.networks import FLOAT32, Networks, count_parameters, trained_parameters

INFERENCE_MAPS = 3
"""Feature maps of full resolution that an autoencoder holds at once without gradients: input, norm, activation."""
SAVED_MAPS = 2.6
"""Feature maps that training an autoencoder keeps for the backward pass, per convolution; measured in torch."""
ACCELERATOR_PROCESS_BYTES = 2 * 2**30
"""Bytes of a worker on an accelerator besides its tensors (context, libraries, fragments), an assumption."""
CPU_PROCESS_BYTES = 600 * 2**20
"""Bytes of a worker on CPUs besides its tensors: torch."""

Memory = dict[str, float]
"""Bytes of one worker, by what they hold."""


def worker_memory(settings: StageConfig, networks: Networks, cluster: Cluster) -> Memory:
    """Return the memory of one worker of a stage on a cluster."""
    encoder, decoder = networks.encoder, networks.decoder
    process = {"process": float(ACCELERATOR_PROCESS_BYTES if cluster.accelerator else CPU_PROCESS_BYTES)}
    if isinstance(settings, TrainConfig):
        encoding, autoencoder = networks.encoding, {}
        if encoding is not None:
            autoencoder = _inference_memory(encoder, encoding.batch_size, encoding.dtype)
        return train_memory(networks.model, settings) | autoencoder | process
    if isinstance(settings, AutoencoderTrainConfig):
        # The state is weights, gradients, AdamW's two moments and averages.
        state = 5 * FLOAT32 * (encoder.parameters + decoder.parameters)
        # Not counted: a discriminator, and the features of a perceptual network.
        maps = SAVED_MAPS * FLOAT32 * networks.trained_share * (encoder.elements + decoder.elements)
        measured = INFERENCE_MAPS * FLOAT32 * max(encoder.largest, decoder.largest) * networks.measured_at_once
        return {"state": state, "activations": max(maps * micro_batch_size(settings), measured)} | process
    if isinstance(settings, EncodeConfig):
        return _inference_memory(encoder, settings.batch_size, settings.dtype) | process
    images = settings.batch_size * (2 if settings.needs_null_class else 1)  # guidance by the model doubles the batch
    loaded = 2 if settings.autoguidance else 1  # the guide's size is not known: it is at most the model's, as a rule
    network = {
        "network": FLOAT32 * loaded * count_parameters(networks.model).total,
        "tokens": images * sampling_bytes(networks.model, settings.dtype),
    }
    return _inference_memory(decoder, settings.batch_size, "float32") | network | process


def _inference_memory(half: AutoencoderSize, batch_size: int, dtype: str) -> Memory:
    size = NUMBER_BYTES[dtype]
    return {"autoencoder": size * half.parameters, "feature maps": INFERENCE_MAPS * size * half.largest * batch_size}


def train_memory(model: DiTConfig | UViTConfig, settings: TrainConfig) -> Memory:
    """Return the memory of the tensors of a worker that trains the transformer.

    "moments" are AdamW's two, "gathered" the blocks that FSDP has in one piece while they compute. "activations" is an
    estimate of what is kept for the backward pass of what is trained; compiled networks keep less. FSDP shards
    gradients in the last micro-batch of a step, and until then every worker holds those of all parameters.
    """
    model = replace(model, gradient_checkpointing=settings.gradient_checkpointing)
    counts = count_parameters(model)
    trained = trained_parameters(model, settings)
    frozen = counts.trained - trained  # shares its memory with its averages
    averaged = trained if settings.lora is not None else counts.total - frozen
    shards = settings.most_workers if settings.strategy == "fsdp" else 1
    gathered = FLOAT32 * min(counts.total, counts.total - counts.blocks + 3 * counts.block) if shards > 1 else 0
    # Where next to nothing is kept, because most blocks are frozen, the forward pass itself holds more.
    activations = max(activation_bytes(model, settings.dtype, settings), sampling_bytes(model, settings.dtype))
    casts = cast_bytes(model, settings) if settings.dtype == "bfloat16" and not settings.gradient_checkpointing else 0
    return {
        "weights": FLOAT32 * counts.total / shards,
        "gradients": FLOAT32 * trained / (shards if settings.accumulation_steps == 1 else 1),
        "moments": 2 * FLOAT32 * trained / shards,
        "averages": FLOAT32 * (1 + len(settings.ema_sigma_rels)) * averaged / shards,
        "gathered": gathered,
        "activations": micro_batch_size(settings) * activations + casts,
    }


def micro_batch_size(settings: TrainConfig | AutoencoderTrainConfig) -> int:
    """Return the images that a worker has in one forward and backward pass."""
    return math.ceil(settings.global_batch_size / settings.most_workers / settings.accumulation_steps)


def sampling_bytes(model: DiTConfig | UViTConfig, dtype: str = "float32") -> float:
    """Return about how many bytes a forward pass without gradients holds at its peak, per image.

    dtype: the dtype of autocast. The residual stream and the norms' outputs stay float32.
    """
    block = NUMBER_BYTES[dtype] * (4 * model.hidden_size + 2 * model.mlp_size)
    trunk = model.num_tokens * (2 * FLOAT32 * model.hidden_size + block)
    head = None if isinstance(model, UViTConfig) else model.head
    if head is None:
        return trunk
    modulated = (1 + 6) * NUMBER_BYTES[dtype] * head.hidden_size  # the condition, and what modulates a block's tokens
    return max(trunk, sampling_bytes(head, dtype) + model.num_tokens * modulated)


def suggest_smaller(section: str, settings: StageConfig, networks: Networks, cluster: Cluster) -> str:
    """Return the cheapest change of a stage's settings with which its workers' memory is enough, as flags.

    section: the stage's table in the recipe, such as "autoencoder.train".
    """
    for change in _smaller_settings(settings):
        change = {name: value for name, value in change.items() if value != getattr(settings, name)}
        try:
            changed = replace(settings, **change)
        except ValueError:  # more micro-batches than a worker has images
            continue
        taken = sum(worker_memory(changed, networks, cluster).values())
        if taken <= cluster.worker_bytes(changed):
            flags = " ".join(f"--set {section}.{name}={str(value).lower()}" for name, value in change.items())
            return f"{flags} takes {taken / 2**30:.1f} GiB"
    return "no setting is enough; take devices with more memory, or a smaller model or image size"


def _smaller_settings(settings: StageConfig) -> list[dict[str, Any]]:
    """Return changes of settings that take less memory, the cheapest one first."""
    if isinstance(settings, EncodeConfig | EvaluateConfig):
        return [{"batch_size": settings.batch_size >> power} for power in range(1, settings.batch_size.bit_length())]
    steps = [{"accumulation_steps": settings.accumulation_steps * 2**power} for power in range(8)]
    if isinstance(settings, AutoencoderTrainConfig):
        return steps
    # Tiny micro-batches use a device badly: recompute activations before that, then shard the state. Sharded gradients
    # take the least without micro-batches.
    recompute, at_once = {"gradient_checkpointing": True}, [{"accumulation_steps": 1}]
    shard = recompute | ({"strategy": "fsdp"} if settings.most_workers > 1 else {})
    few = (at_once if settings.strategy == "fsdp" else []) + steps[:3]
    return few + [recompute | step for step in few] + [shard | step for step in at_once + steps]
