"""The speed of this machine: a short warm-up of one core with a recipe's own networks, without Ray.

Times are CPU times of this process, which other load on the machine hardly changes.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dit.autoencoder import MEMORY_FORMATS, Autoencoder, create_autoencoder
from dit.hardware.accelerators import accelerator_of
from dit.hardware.peak_speed import measured_flops
from dit.macs import forward_macs
from dit.model import build_model
from dit.objective import create_process
from dit.precision import in_dtype, network_precision, weights_dtype
from dit.train import create_state, train_step
from evaluation.extractors import create_extractor
from evaluation.features.extractor_table import EFFICIENTNET_LITE0, EXTRACTORS
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.open import open_source
from pipelines.images.preprocess import read_cropped
from pipelines.planning.hardware import READ_SECONDS, UTILISATION, Cluster, Kind, parse_cluster
from pipelines.planning.memory import micro_batch_size
from pipelines.planning.networks import Networks

MEASURED_SECONDS = 0.5
"""CPU seconds for which each kind of work is repeated."""
CALL_SECONDS = 2.0
"""Longest call: a batch has as many images as should take this time. Work is not measured if one image takes longer."""
READ_IMAGES = 64
"""Images that are read and cropped."""


def measure_this_machine(config: Recipe, networks: Networks) -> Cluster:
    """Return this machine's accelerators if they are known ones, else its cores with their speed in a recipe's work.

    Networks with weights from elsewhere are not measured. Where the recipe chooses a dtype both are measured: which one
    is faster depends on the cores and on the model.
    """
    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        if known := accelerator_of(torch.cuda.get_device_name(0)):
            cluster = parse_cluster(f"{torch.cuda.device_count()}x{known}", price=0.0)
            # A GPU may have more memory than others of its name, such as a V100 of 32 GB, or lend a part of it.
            memory = torch.cuda.get_device_properties(0).total_memory
            return replace(cluster, cores=cores, memory_bytes=memory)
    torch.set_num_threads(1)
    core_flops = measured_flops(torch.device("cpu"), torch.float32)
    speeds: dict[Kind, float] = {}
    gains: dict[Kind, float] = {}
    # By kind of work: FLOPs per image, images of the largest batch, and what prepares the work on a batch.
    work: dict[Kind, tuple[int, int, Callable[..., Callable[[], object]]]] = {}
    if config.autoencoder.train:
        work["encode"] = (2 * networks.encoder.macs, config.encode.batch_size, _encoder_pass)
    work["train"] = (6 * forward_macs(networks.model), micro_batch_size(config.train), _training_step)
    work["evaluate"] = (2 * forward_macs(networks.model), config.evaluate.batch_size, _model_pass)
    if config.evaluate.extractor == EFFICIENTNET_LITE0:
        work["features"] = (2 * EXTRACTORS[EFFICIENTNET_LITE0].macs, 8, _extractor_pass)
    for kind, (flops, most, prepare) in work.items():
        images = min(most, int(CALL_SECONDS * core_flops * UTILISATION[kind]["core"] / flops))
        if images:
            seconds = _seconds_per_call(prepare(config, networks, images, "float32"))
            speeds[kind] = images * flops / seconds
            if kind != "features":
                gains[kind] = seconds / _seconds_per_call(prepare(config, networks, images, "bfloat16"))
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


def _training_step(config: Recipe, networks: Networks, images: int, dtype: str) -> Callable[[], object]:
    model, settings = networks.model, replace(config.train, accumulation_steps=1)
    process = create_process(config.objective.kind, **config.objective.settings(model))
    state = create_state(build_model(model), settings)
    latents, labels = torch.randn(images, model.in_channels, *model.latent_size), torch.zeros(images, dtype=torch.long)
    t = torch.zeros(images) if process.kind == "flow" else labels

    def losses(network: Any, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        with network_precision("cpu", dtype):
            return {"loss": process.training_losses(network, latents, t, labels, noise)["loss"].mean()}

    return lambda: train_step(state, torch.randn_like(latents), losses, settings)


def _model_pass(config: Recipe, networks: Networks, images: int, dtype: str) -> Callable[[], object]:
    model = networks.model
    network = in_dtype(build_model(model).eval(), dtype)
    x, zeros = torch.randn(images, model.in_channels, *model.latent_size), torch.zeros(images)
    return torch.no_grad()(lambda: network(x, zeros, zeros.long()))


def _encoder_pass(config: Recipe, networks: Networks, images: int, dtype: str) -> Callable[[], object]:
    own, side = config.autoencoder.train, config.images.size
    assert own is not None, "only an autoencoder of the recipe's own is measured"
    created = create_autoencoder(
        image_size=side, latent_channels=own.latent_channels, downsample=own.downsample, width=own.width
    )
    memory_format = MEMORY_FORMATS[config.encode.layout]
    # diffusers' own `to` warns of modules that should stay in float32, of which there are none.
    created = torch.nn.Module.to(created, dtype=weights_dtype(dtype))
    autoencoder = Autoencoder(created.to(memory_format=memory_format))
    pixels = torch.rand(images, 3, side, side).contiguous(memory_format=memory_format)
    return lambda: autoencoder.encode(pixels)


def _extractor_pass(config: Recipe, networks: Networks, images: int, dtype: str) -> Callable[[], object]:
    extractor = create_extractor(EFFICIENTNET_LITE0)
    pixels = torch.zeros(images, 3, config.images.size, config.images.size, dtype=torch.uint8)
    return lambda: extractor(pixels)


def _seconds_per_call(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, after a first one that is not counted."""
    work()
    calls, started = 0, time.process_time()
    while calls == 0 or time.process_time() - started < MEASURED_SECONDS:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def _read_seconds(images: ImagesConfig) -> float:
    """Return the CPU seconds to read and crop one of a recipe's images, assumed if they are not on this machine."""
    try:
        listing, _ = open_source(images).listing().split(images.held_out)
    except (FileNotFoundError, ValueError):
        return READ_SECONDS
    first = listing.take(range(min(READ_IMAGES, len(listing))))
    started = time.process_time()
    read_cropped(images, first.keys, first.locations)
    return (time.process_time() - started) / len(first)
