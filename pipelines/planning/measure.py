"""How fast a core of this machine does a recipe's work: a short warm-up with the recipe's own networks, without Ray.

Seconds are those that the process computes, on one core: what else the machine does meanwhile hardly counts.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from dit.macs import forward_macs
from evaluation.extractors import EFFICIENTNET_LITE0, extractor_macs
from pipelines.planning.hardware import CPU_UTILISATION, Cluster, Kind
from pipelines.planning.memory import Subject
from pipelines.planning.time import training_flops

MEASURED_SECONDS = 0.5
"""Of each kind of work."""
PASS_SECONDS = 2.0
"""A pass has as many images as should take no longer; what takes longer for one image is not measured."""
READ_IMAGES = 64
STAGES: dict[str, str] = {"encode": "encode", "train": "train", "sample": "evaluate"}
"""Kinds of work whose precision a stage's `dtype` chooses, and the stage."""


def warmed_up(subject: Subject) -> Cluster:
    """This machine's cores, with speeds that were measured now where that takes seconds.

    Of bfloat16 and float32 alike where a stage has a choice: which is faster depends on the cores and on the model.
    """
    import torch

    torch.set_num_threads(1)
    speeds: dict[str, float] = {}
    gains: dict[str, float] = {}
    for kind, (flops, most, prepare) in works(subject).items():
        images = min(most, int(PASS_SECONDS * subject.cluster.core_flops * CPU_UTILISATION[kind] / flops))
        if images == 0:
            continue
        if stage := STAGES.get(kind):
            by_dtype = {
                dtype: seconds_of(prepare(with_dtype(subject, stage, dtype), images))
                for dtype in ("float32", "bfloat16")
            }
            gains[stage] = by_dtype["float32"] / by_dtype["bfloat16"]
            seconds = by_dtype[getattr(subject.config, stage).dtype]
        else:
            seconds = seconds_of(prepare(subject, images))
        speeds[kind] = images * flops / seconds
    return replace(subject.cluster, speeds=speeds, bfloat16_gains=gains, read_seconds=_read_seconds(subject))


def works(subject: Subject) -> dict[Kind, tuple[int, int, Callable]]:
    """By kind: FLOPs for an image, images of a pass at most, and what prepares a pass of some images."""
    config = subject.config
    share = config.train.global_batch_size // config.train.most_workers // config.train.accumulation_steps
    found: dict[Kind, tuple[int, int, Callable]] = {
        "train": (training_flops(subject.model), share, _training_step),
        "sample": (2 * forward_macs(subject.model), config.evaluate.batch_size, _model_pass),
    }
    if own := config.autoencoder.train:
        both = subject.encoder.macs + subject.decoder.macs
        found["reconstruct"] = (6 * both, own.global_batch_size // own.num_workers, _autoencoder_step)
        found["encode"] = (2 * subject.encoder.macs, config.encode.batch_size, _encoder_pass)
        found["decode"] = (2 * subject.decoder.macs, config.evaluate.batch_size, _decoder_pass)
    if config.evaluate.extractor == EFFICIENTNET_LITE0:  # the weights of others may have to be fetched
        found["features"] = (2 * extractor_macs(EFFICIENTNET_LITE0), 8, _features)
    return found


def with_dtype(subject: Subject, stage: str, dtype: str) -> Subject:
    """The same with another precision of a stage."""
    settings = replace(getattr(subject.config, stage), dtype=dtype)
    return replace(subject, config=replace(subject.config, **{stage: settings}))


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of this process for one call, after a first one that does not count."""
    work()
    calls, started = 0, time.process_time()
    while calls == 0 or time.process_time() - started < MEASURED_SECONDS:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def _training_step(subject: Subject, images: int) -> Callable[[], object]:
    import torch

    from dit.model import build_model
    from dit.objective import create_process
    from dit.train import create_state, train_step

    config, model = subject.config, subject.model
    process = create_process(config.objective.kind, **config.objective.settings())
    state = create_state(build_model(model), config.train)
    latents = torch.randn(images, model.in_channels, *model.latent_size)
    t = torch.zeros(images) if process.kind == "flow" else torch.zeros(images, dtype=torch.long)
    labels = torch.zeros(images, dtype=torch.long)

    def losses(network, batch) -> dict:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.dtype == "bfloat16"):
            terms = process.training_losses(network, latents, t, labels, batch)
        return {"loss": terms["loss"].mean()}

    whole = replace(config.train, accumulation_steps=1)
    return lambda: train_step(state, torch.randn_like(latents), losses, whole)


def _model_pass(subject: Subject, images: int) -> Callable[[], object]:
    import torch

    from dit.model import build_model
    from dit.samplers import in_dtype

    model = in_dtype(build_model(subject.model).eval(), subject.config.evaluate.dtype)
    x = torch.randn(images, subject.model.in_channels, *subject.model.latent_size)
    t, labels = torch.zeros(images), torch.zeros(images, dtype=torch.long)
    return torch.no_grad()(lambda: model(x, t, labels))


def _own_autoencoder(subject: Subject):
    from dit.autoencoder import create_autoencoder

    settings = subject.config.autoencoder.train
    assert settings is not None, "measured only where one is trained"
    return create_autoencoder(
        image_size=subject.config.images.size,
        latent_channels=settings.latent_channels,
        downsample=settings.downsample,
        width=settings.width,
    )


def _autoencoder_step(subject: Subject, images: int) -> Callable[[], object]:
    import torch

    from dit.autoencoder import AutoencoderObjective
    from dit.train import create_state, train_step

    settings, side = subject.config.autoencoder.train, subject.config.images.size
    assert settings is not None, "measured only where one is trained"
    state = create_state(AutoencoderObjective(_own_autoencoder(subject), settings.kl_weight), settings)
    pixels = torch.rand(images, 3, side, side)
    small = side // settings.downsample
    noise = torch.randn(images, settings.latent_channels, small, small)
    whole = replace(settings, accumulation_steps=1)
    return lambda: train_step(state, pixels, lambda network, batch: network(batch, noise), whole)


def _encoder_pass(subject: Subject, images: int) -> Callable[[], object]:
    import torch

    from dit.autoencoder import MEMORY_FORMATS, Autoencoder

    settings, side = subject.config.encode, subject.config.images.size
    memory_format = MEMORY_FORMATS[settings.memory_format]
    module = _own_autoencoder(subject).type(getattr(torch, settings.dtype))
    autoencoder = Autoencoder(module.to(memory_format=memory_format))
    pixels = torch.rand(images, 3, side, side).contiguous(memory_format=memory_format)
    return lambda: autoencoder.encode(pixels)


def _decoder_pass(subject: Subject, images: int) -> Callable[[], object]:
    import torch

    from dit.autoencoder import Autoencoder

    autoencoder = Autoencoder(_own_autoencoder(subject))
    latents = torch.randn(images, subject.model.in_channels, *subject.model.latent_size)
    return lambda: autoencoder.decode(latents)


def _features(subject: Subject, images: int) -> Callable[[], object]:
    import torch

    from evaluation.extractors import create_extractor

    extractor = create_extractor(EFFICIENTNET_LITE0)
    side = subject.config.images.size
    pixels = torch.zeros(images, 3, side, side, dtype=torch.uint8)
    return lambda: extractor(pixels)


def _read_seconds(subject: Subject) -> float | None:
    """Of one image of the recipe's, if they are here."""
    from pipelines.images.open import open_source
    from pipelines.images.preprocess import read_cropped

    try:
        listing, _ = open_source(subject.config.images).listing().split(subject.config.images.held_out)
    except (FileNotFoundError, ValueError):
        return None
    first = listing.take(range(min(READ_IMAGES, len(listing))))
    started = time.process_time()
    read_cropped(subject.config.images, first.keys, None if first.places is None else first.places.tolist())
    return (time.process_time() - started) / len(first)
