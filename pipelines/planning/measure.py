"""The speed of this machine: a short warm-up of one core with a recipe's own networks, without Ray.

Times are CPU times of this process, which other load on the machine hardly changes.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dit.accelerators import ACCELERATORS
from dit.autoencoder import MEMORY_FORMATS, Autoencoder, AutoencoderObjective, create_autoencoder
from dit.config import DiTConfig, UViTConfig
from dit.devices import measured_flops
from dit.macs import forward_macs
from dit.model import build_model
from dit.objective import create_process
from dit.samplers import in_dtype
from dit.train import create_state, train_step
from evaluation.extractors import EFFICIENTNET_LITE0, create_extractor, extractor_macs
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.config.training import AutoencoderTrainConfig
from pipelines.images.open import open_source
from pipelines.images.preprocess import read_cropped
from pipelines.planning.hardware import UTILISATION, Cluster, Kind, parse_cluster
from pipelines.planning.networks import Networks
from pipelines.planning.time import training_flops

MEASURED_SECONDS = 0.5
"""CPU seconds for which each kind of work is repeated."""
CALL_SECONDS = 2.0
"""Longest call: a batch has as many images as should take this time. Work is not measured if one image takes longer."""
READ_IMAGES = 64
"""Images that are read and cropped."""
STAGE_OF: dict[Kind, str] = {"encode": "encode", "train": "train", "sample": "evaluate"}
"""Kinds of work that are measured in both precisions, with the stage whose `dtype` chooses between them."""

Work = Callable[[], object]


class Workload(NamedTuple):
    """One kind of work of a recipe."""

    flops: int
    """FLOPs per image."""
    max_images: int
    """Images of the largest batch."""
    prepare: Callable[[int, str], Work]
    """Returns the work on a batch; takes its images and the dtype, "float32" or "bfloat16"."""


def measure_this_machine(config: Recipe, networks: Networks) -> Cluster:
    """Return this machine's accelerators if they are known ones, else its cores with their speed in a recipe's work.

    Where a stage can choose its dtype both are measured: which one is faster depends on the cores and on the model.
    """
    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        found = torch.cuda.get_device_name(0)
        if known := next((name for name in ACCELERATORS if name in found), None):
            return parse_cluster(f"{torch.cuda.device_count()}x{known}", price=0.0, cores=cores)
    torch.set_num_threads(1)
    core_flops = measured_flops(torch.device("cpu"), torch.float32)
    speeds: dict[str, float] = {}
    gains: dict[str, float] = {}
    for kind, work in workloads(config, networks).items():
        images = min(work.max_images, int(CALL_SECONDS * core_flops * UTILISATION[kind]["core"] / work.flops))
        if images == 0:
            continue
        stage = STAGE_OF.get(kind)
        dtypes = ("float32", "bfloat16") if stage else ("float32",)
        seconds = {dtype: _seconds_per_call(work.prepare(images, dtype)) for dtype in dtypes}
        speeds[kind] = images * work.flops / seconds[getattr(config, stage).dtype if stage else "float32"]
        if stage:
            gains[stage] = seconds["float32"] / seconds["bfloat16"]
    return Cluster(
        name="CPU core",
        count=cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=cores,
        core_flops=core_flops,
        speeds=speeds,
        bfloat16_gains=gains,
        read_seconds=_read_seconds(config.images),
    )


def workloads(config: Recipe, networks: Networks) -> dict[Kind, Workload]:
    """Return the kinds of work of a recipe that can be done without weights from elsewhere."""
    found = _transformer_work(config, networks.model)
    if config.autoencoder.train:
        found |= _autoencoder_work(config, config.autoencoder.train, networks)
    if config.evaluate.extractor == EFFICIENTNET_LITE0:
        side = config.images.size

        def features(images: int, dtype: str) -> Work:
            extractor, pixels = create_extractor(EFFICIENTNET_LITE0), torch.zeros(images, 3, side, side).byte()
            return lambda: extractor(pixels)

        found["features"] = Workload(2 * extractor_macs(EFFICIENTNET_LITE0), 8, features)
    return found


def _transformer_work(config: Recipe, model: DiTConfig | UViTConfig) -> dict[Kind, Workload]:
    settings = replace(config.train, accumulation_steps=1)
    micro_batch = settings.global_batch_size // settings.most_workers // config.train.accumulation_steps

    def inputs(images: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(images, model.in_channels, *model.latent_size), torch.zeros(images, dtype=torch.long)

    def training_step(images: int, dtype: str) -> Work:
        process = create_process(config.objective.kind, **config.objective.settings())
        state, (latents, labels) = create_state(build_model(model), settings), inputs(images)
        t = torch.zeros(images) if process.kind == "flow" else labels

        def losses(network: Any, noise: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                return {"loss": process.training_losses(network, latents, t, labels, noise)["loss"].mean()}

        return lambda: train_step(state, torch.randn_like(latents), losses, settings)

    def model_pass(images: int, dtype: str) -> Work:
        network = in_dtype(build_model(model).eval(), dtype)
        (x, labels), t = inputs(images), torch.zeros(images)
        return torch.no_grad()(lambda: network(x, t, labels))

    return {
        "train": Workload(training_flops(model), micro_batch, training_step),
        "sample": Workload(2 * forward_macs(model), config.evaluate.batch_size, model_pass),
    }


def _autoencoder_work(config: Recipe, own: AutoencoderTrainConfig, networks: Networks) -> dict[Kind, Workload]:
    settings, side = replace(own, accumulation_steps=1), config.images.size
    encoder, decoder = networks.encoder, networks.decoder

    def create() -> Any:
        return create_autoencoder(
            image_size=side, latent_channels=own.latent_channels, downsample=own.downsample, width=own.width
        )

    def latents(images: int) -> torch.Tensor:
        return torch.randn(images, own.latent_channels, side // own.downsample, side // own.downsample)

    def training_step(images: int, dtype: str) -> Work:
        state = create_state(AutoencoderObjective(create(), own.kl_weight), settings)
        pixels, noise = torch.rand(images, 3, side, side), latents(images)
        return lambda: train_step(state, pixels, lambda network, batch: network(batch, noise), settings)

    def encoder_pass(images: int, dtype: str) -> Work:
        memory_format = MEMORY_FORMATS[config.encode.memory_format]
        autoencoder = Autoencoder(create().to(dtype=getattr(torch, dtype)).to(memory_format=memory_format))
        pixels = torch.rand(images, 3, side, side).contiguous(memory_format=memory_format)
        return lambda: autoencoder.encode(pixels)

    def decoder_pass(images: int, dtype: str) -> Work:
        autoencoder, given = Autoencoder(create()), latents(images)
        return lambda: autoencoder.decode(given)

    share = own.global_batch_size // own.num_workers
    return {
        "reconstruct": Workload(6 * (encoder.macs + decoder.macs), share, training_step),
        "encode": Workload(2 * encoder.macs, config.encode.batch_size, encoder_pass),
        "decode": Workload(2 * decoder.macs, config.evaluate.batch_size, decoder_pass),
    }


def _seconds_per_call(work: Work) -> float:
    """Return the CPU seconds of one call, after a first one that is not counted."""
    work()
    calls, started = 0, time.process_time()
    while calls == 0 or time.process_time() - started < MEASURED_SECONDS:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def _read_seconds(images: ImagesConfig) -> float | None:
    """Return the CPU seconds to read and crop one of a recipe's images, or None if they are not on this machine."""
    try:
        listing, _ = open_source(images).listing().split(images.held_out)
    except (FileNotFoundError, ValueError):
        return None
    first = listing.take(range(min(READ_IMAGES, len(listing))))
    started = time.process_time()
    read_cropped(images, first.keys, first.locations)
    return (time.process_time() - started) / len(first)
