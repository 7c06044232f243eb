"""What each stage of a recipe computes, and how long that takes on a cluster; needs no torch.

All of a stage's work counts, also what an earlier run has finished. Waiting for machines, compilation, previews, the
measurements of a trained autoencoder and the metrics' own arithmetic do not.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from dit.config import DiTConfig, UViTConfig
from dit.float8 import require_float8_shapes
from dit.macs import forward_macs
from evaluation.extractors import extractor_macs
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import VALIDATION_BATCH, TrainConfig
from pipelines.planning.backward import training_macs
from pipelines.planning.hardware import NODE_DEVICES, Cluster
from pipelines.planning.networks import FLOAT32, Networks, count_parameters, trained_parameters
from pipelines.planning.rates import update_seconds

TRAIN_START_SECONDS = 25.0
"""Seconds of a training stage before its first step: processes, torch, process group; measured on two CPU cores."""
DATA_START_SECONDS = 12.0
"""Seconds of encode or evaluate before the first image: processes, torch, weights; measured on two CPU cores."""
MIN_BLOCK_SECONDS = 100e-6
"""Seconds of a block's forward pass on however few images: about 20 kernels of 5 microseconds to launch."""
VALIDATION = "validation"
"""Validation's name among what takes a training's seconds. Its time is not in the images per second of a training."""


class Work(NamedTuple):
    """The work of one stage on a cluster."""

    description: str
    flops: float
    seconds: dict[str, float]
    """Seconds by what takes them; of two that overlap only the longer one."""
    basis: str
    """What the speed rests on, in words."""


def autoencoder_work(settings: AutoencoderTrainConfig, networks: Networks, cluster: Cluster, images: int) -> Work:
    """Return the work of training a recipe's own autoencoder on `images` in all of its steps.

    A discriminator and a perceptual network come on top of it.
    """
    encoder = 2 if settings.decoder_only else 6  # FLOPs for each multiply-accumulate: without a backward pass, or with
    flops = images * networks.trained_share * (encoder * networks.encoder.macs + 6 * networks.decoder.macs)
    speed, basis = cluster.speed("encode", settings, settings.dtype or "float32")
    return Work(_steps(settings), flops, {"start": TRAIN_START_SECONDS, "arithmetic": flops / speed}, basis)


def encode_work(settings: EncodeConfig, networks: Networks, cluster: Cluster, images: int) -> Work:
    """Return the work of encoding images, and their horizontal flips if the recipe stores those."""
    flops = images * 2 * networks.encoder.macs * (1 + settings.flip)
    speed, basis = cluster.speed("encode", settings, settings.dtype)
    # The last batch of a shard is padded.
    padded = math.ceil(settings.shard_rows / settings.batch_size) * settings.batch_size / settings.shard_rows
    encoding, reading = padded * flops / speed, images * cluster.read_seconds / cluster.cores
    seconds = {"start": DATA_START_SECONDS, "arithmetic": encoding, "reading images": reading}
    if cluster.accelerator:  # cores read while accelerators encode
        del seconds["arithmetic" if reading > encoding else "reading images"]
    return Work(f"{images:,} images{' and their horizontal flips' * settings.flip}", flops, seconds, basis)


def train_work(settings: TrainConfig, networks: Networks, cluster: Cluster, images: int, held_out: int = 0) -> Work:
    """Return the work of training the transformer on `images` in all of its steps, and of encoding them meanwhile.

    held_out: images of each validation, if the recipe validates. What gradient checkpointing recomputes takes time, and
    does not count as FLOPs, as it does not in MFU. An adapter, or a part of the parameters, has a shorter backward pass
    (`pipelines.planning.backward`).
    """
    macs = training_macs(networks.model, settings)
    flops = images * 2 * (macs.forward + macs.backward)
    speed, basis = cluster.speed("train", settings, settings.dtype, settings.compile, networks.model.hidden_size)
    if settings.matmul == "float8":
        require_float8_shapes(networks.model)
        basis += "; products in float8 were not measured, and are planned as in bfloat16"
    seconds = {"start": TRAIN_START_SECONDS}
    if cluster.accelerator:
        step = step_seconds(networks.model, settings, cluster)
        overlapped = step.all_reduce > step.backward
        seconds["arithmetic"] = settings.steps * (step.forward + (0 if overlapped else step.backward))
        seconds["gradient all-reduce"] = settings.steps * (step.all_reduce if overlapped else 0)
        seconds["update"] = settings.steps * step.update
    else:
        seconds["arithmetic"] = images * 2 * sum(macs) / speed
    if networks.encoding is not None:
        encoding = images * 2 * networks.encoder.macs
        flops += encoding
        share, batch = settings.global_batch_size / settings.most_workers, networks.encoding.batch_size
        padded = math.ceil(share / batch) * batch / share * encoding
        # A device computes for the autoencoder and the transformer in turn, while cores read.
        seconds["encoding"] = padded / cluster.speed("encode", settings, networks.encoding.dtype)[0]
        hidden = sum(seconds.values()) - seconds["start"] if cluster.accelerator else 0.0
        seconds["reading images"] = max(0.0, images * cluster.read_seconds / cluster.cores - hidden)
    description = _steps(settings)
    if validations := count_validations(settings, held_out):
        description += f", {validations:,} validations of {held_out:,} images"
        passes = validations * 2 * 2 * forward_macs(networks.model)  # by the averaged and by the raw weights
        flops += passes * held_out
        seconds[VALIDATION] = passes * _padded_validation(settings, held_out) / speed
    return Work(description, flops, seconds, basis)


def count_validations(settings: TrainConfig, held_out: int) -> int:
    """Return how often a training measures its loss on held-out images: also after its last step."""
    return math.ceil(settings.steps / settings.validate_every) if settings.validate_every and held_out else 0


def _padded_validation(settings: TrainConfig, held_out: int) -> int:
    """Return how many images all workers compute for a validation: every one has as many full batches as any other."""
    batch = min(VALIDATION_BATCH, held_out)
    return math.ceil(math.ceil(held_out / batch) / settings.most_workers) * batch * settings.most_workers


def evaluate_work(
    settings: EvaluateConfig, networks: Networks, cluster: Cluster, images: int, held_out: int = 0
) -> Work:
    """Return the work of sampling and decoding, and of the features of `images`: samples, real ones, reconstructions.

    held_out: all images that are held out, of which some are reconstructed. Guidance doubles the network's FLOPs, here
    also outside of its interval.
    """
    samples, reconstructed = settings.num_samples, count_reconstructions(settings, held_out)
    read = images - samples
    calls = settings.calls_per_sample * (2 if settings.cfg_scale > 1 else 1)
    width = networks.model.hidden_size
    sampling_speed, basis = cluster.speed("evaluate", settings, settings.dtype, settings.compile, width)
    sampling = samples * calls * 2 * forward_macs(networks.model)
    macs = {each.extractor: extractor_macs(each.extractor) for each in settings.for_each_extractor()}
    extraction = sum(each or 0 for each in macs.values())
    autoencoding = reconstructed * 2 * (networks.encoder.macs + networks.decoder.macs)
    decoding, features = samples * 2 * networks.decoder.macs + autoencoding, images * 2 * extraction
    seconds = {
        "start": DATA_START_SECONDS,
        "sampling": sampling / sampling_speed,
        "decoding": decoding / cluster.speed("encode", settings, settings.decoder_dtype or "float32")[0],
        "features": features / cluster.speed("features", settings)[0],
        # Each worker reads the real images that it scores on one core.
        "reading images": read * cluster.read_seconds / min(settings.num_workers, cluster.cores),
    }
    real_images = f", {read - reconstructed:,} real images" if read else ""
    real_images += f", {reconstructed:,} reconstructions" if reconstructed else ""
    unknown = [name for name, each in macs.items() if each is None]
    without = f"; features of {', '.join(unknown)} come on top" if unknown else ""
    description = f"{samples:,} samples of {settings.sampling_steps:,} steps{real_images}{without}"
    return Work(description, sampling + decoding + features, seconds, basis)


def count_reconstructions(settings: EvaluateConfig, held_out: int) -> int:
    """Return how many of the held-out images are encoded, decoded and scored: as many as there are samples at most."""
    is_wanted = settings.reconstructions is not False and held_out > 1
    return min(held_out, settings.num_samples) if is_wanted else 0


def _steps(settings: TrainConfig | AutoencoderTrainConfig) -> str:
    return f"{settings.steps:,} steps of {settings.global_batch_size:,} images"


WORK: dict[str, Callable[..., Work]] = {
    "autoencoder": autoencoder_work,
    "encode": encode_work,
    "train": train_work,
    "evaluate": evaluate_work,
}
"""The stages in their order, each with the function that returns its work."""


class StepSeconds(NamedTuple):
    """Seconds of one data-parallel training step on accelerators."""

    forward: float
    backward: float
    all_reduce: float
    """Gradient all-reduce, or FSDP's gathers of weights and scatter of gradients; overlaps with the backward pass."""
    update: float
    """Optimizer, averages and gradient norm, which memory bandwidth bounds."""


def step_seconds(model: DiTConfig | UViTConfig, settings: TrainConfig, cluster: Cluster) -> StepSeconds:
    """Return the seconds of a training step of workers with one accelerator each."""
    accelerator, workers, macs = cluster.accelerator, settings.most_workers, training_macs(model, settings)
    assert accelerator is not None, "a step on CPU cores takes as long as its arithmetic"
    speed, _ = cluster.speed("train", settings, settings.dtype, settings.compile, model.hidden_size)
    blocks = model.depth + (0 if isinstance(model, UViTConfig) else model.head_depth or 0)
    micro_batches = settings.accumulation_steps
    launches = micro_batches * blocks * MIN_BLOCK_SECONDS
    forward = max(2 * macs.forward * settings.global_batch_size / speed, launches)
    # A ring all-reduce moves 2 (n - 1) / n of the gradients once a step. FSDP scatters gradients once a step, and
    # gathers weights twice in every micro-batch: it frees them after each pass, also where gradients stay unsharded.
    fsdp, per_node = settings.strategy == "fsdp", min(cluster.count, NODE_DEVICES)
    trained, gathers = trained_parameters(model, settings), 2 * micro_batches if fsdp else 0
    numbers = gathers * _sharded_parameters(model, settings) + (1 if fsdp else 2) * trained
    moved = (workers - 1) / workers * FLOAT32 * numbers
    bandwidth = accelerator.link if workers <= per_node else min(accelerator.link, per_node * accelerator.network)
    update = update_seconds(trained, accelerator, averages=1 + len(settings.ema_sigma_rels))
    return StepSeconds(
        forward=forward,
        backward=forward * (macs.backward + macs.recomputed) / macs.forward,
        all_reduce=moved / bandwidth,
        update=update / (workers if fsdp else 1),
    )


def _sharded_parameters(model: DiTConfig | UViTConfig, settings: TrainConfig) -> int:
    """Return how many parameters FSDP gathers for a pass: also frozen ones, and an adapter's beside its base's.

    Frozen blocks before the first trained one are gathered once and not twice, which is not taken into account.
    """
    adapter = trained_parameters(model, settings) if settings.lora is not None else 0
    return count_parameters(model).trained + adapter
