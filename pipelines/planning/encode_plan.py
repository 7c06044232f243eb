"""What `raydit encode` would do, before it does anything: `--dry-run`. Writes nothing and starts no Ray."""

import os
import time
from dataclasses import dataclass, replace

import numpy as np

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.config.recipe import Recipe
from pipelines.images.open import open_source
from pipelines.images.preprocess import read_cropped
from pipelines.latents import schema
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.encoding import EncodeImages, describe_latents, encode_identity
from pipelines.latents.shards import IMAGES, LatentShard, inspect_existing, plan_shards, read_records

MEASURED_IMAGES = 64
MEASURED_SECONDS = 3.0
CPU_BATCH = 4
"""Images per pass of the measurement on a CPU, where the time for an image hardly depends on it."""
MUCH_PADDING = 0.1


@dataclass(frozen=True)
class EncodePlan:
    """What there is to encode. None where it cannot be known yet; `unknown` says why."""

    images: int
    held_out: int
    classes: int
    shards: int
    pending_shards: int
    pending_images: int
    changed: list[str]
    """Why what is in the output does not count and is moved aside."""
    padding: float
    """Share of the autoencoder's work that fills up the last pass of every shard."""
    moments_shape: tuple[int, int, int] | None
    bytes_per_image: int | None
    """Of moments; keys and Parquet's own take some dozens more."""
    free_bytes: int | None
    seconds_to_read: float | None = None
    """CPU seconds to read and crop one image, measured."""
    seconds_to_encode: float | None = None
    """Seconds of one worker to encode one image, mirrored or not as the recipe says, measured."""
    images_per_second: float | None = None
    unknown: str = ""

    @property
    def bytes(self) -> int | None:
        return None if self.bytes_per_image is None else self.bytes_per_image * self.pending_images

    @property
    def seconds(self) -> float | None:
        return None if self.images_per_second is None else self.pending_images / self.images_per_second


def plan_encode(config: Recipe) -> EncodePlan:
    """Plan the encode job of a recipe. Raises as `encode` would where there are no images."""
    listing, held_out = open_source(config.images).listing().split(config.images.held_out)
    autoencoder, unknown = known_autoencoder(config)
    folder = config.latents
    shards, changed = plan_shards(folder, listing, None, config.encode.shard_rows), []
    finished = 0
    if "sha256" in autoencoder:
        identity = encode_identity(config, listing, autoencoder)
        earlier, lost = inspect_existing(folder, identity, listing)
        changed = Artifact("encode", folder, identity).changes(() if lost else IMAGES) + lost
        if not changed:
            finished = len(earlier.manifest["shards"]) if earlier else 0
            shards = plan_shards(folder, listing, earlier, config.encode.shard_rows)
    pending = [shard for shard, record in zip(shards, read_records(shards), strict=True) if changed or record is None]
    shape = tuple(describe_latents(config, listing, autoencoder)["moments_shape"]) if autoencoder else None
    size = np.dtype(schema.MOMENTS_DTYPE).itemsize * (1 + config.encode.flip)
    plan = EncodePlan(
        images=len(listing),
        held_out=len(held_out),
        classes=len(listing.class_names),
        shards=finished + len(shards),
        pending_shards=len(pending),
        pending_images=sum(len(shard.images) for shard in pending),
        changed=changed,
        padding=padding(pending, config.encode.batch_size),
        moments_shape=shape,
        bytes_per_image=int(np.prod(shape)) * size if shape else None,
        free_bytes=storage.free_bytes(config.output),
        unknown=unknown,
    )
    return plan if unknown or not pending else measured(plan, config, pending)


def padding(shards: list[LatentShard], batch_size: int) -> float:
    """Share of images in full passes that are none, because no pass holds images of two shards."""
    images = sum(len(shard.images) for shard in shards)
    places = sum(-(-len(shard.images) // batch_size) * batch_size for shard in shards)
    return 1 - images / places if places else 0.0


def known_autoencoder(config: Recipe) -> tuple[dict, str]:
    """What is known of the autoencoder without a download, and why no time can be measured, if so."""
    from dit.autoencoder import record_autoencoder
    from dit.autoencoder_size import STABLE_DIFFUSION

    try:
        return autoencoder_of(config).describe(download=False), ""
    except FileNotFoundError as error:
        id, train = config.autoencoder.id, config.autoencoder.train
        if train is None:
            known = record_autoencoder(id, 4) if id in STABLE_DIFFUSION else {}
            shape = {name: known[name] for name in ("latent_channels", "downsample") if known}
            return shape, f"{id} is not on this machine"
        shape = {"latent_channels": train.latent_channels, "downsample": train.downsample}
        return shape, f"the autoencoder is trained first ({error})"


def measured(plan: EncodePlan, config: Recipe, pending: list[LatentShard]) -> EncodePlan:
    """The plan with speeds: a few of its first images read and encoded in this process."""
    import torch

    workers = config.encode
    if workers.gpus_per_worker and not torch.cuda.is_available():
        return replace(plan, unknown="encode.gpus_per_worker is set, and this machine has no GPU to measure on")
    first = pending[0].images.take(range(min(MEASURED_IMAGES, len(pending[0].images))))
    started = time.perf_counter()
    images, _, _ = read_cropped(config.images, first.keys, None if first.places is None else first.places.tolist())
    read = (time.perf_counter() - started) / len(first)
    if not len(images):
        return replace(plan, unknown=f"none of the first {len(first)} images can be read")
    encode = seconds_to_encode(config, images)
    cores = os.cpu_count() or 1
    busy = read + (0 if workers.gpus_per_worker else encode * workers.cpus_per_worker)
    rate = 1 / max(encode / workers.num_workers, busy / cores)
    return replace(plan, seconds_to_read=read, seconds_to_encode=encode, images_per_second=rate)


def seconds_to_encode(config: Recipe, images: np.ndarray) -> float:
    """Of one worker, for one image and its mirror if it is wanted; after a warm-up."""
    settings = config.encode
    if not settings.gpus_per_worker:
        settings = replace(settings, batch_size=min(settings.batch_size, CPU_BATCH))
    worker = EncodeImages(autoencoder_of(config), settings)
    batch = np.resize(images, (settings.batch_size, *images.shape[1:]))
    worker({"images": batch[:1]})
    passes, started = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - started < MEASURED_SECONDS:
        worker({"images": batch})
        passes += 1
    return (time.perf_counter() - started) / passes / len(batch)


def plan_lines(plan: EncodePlan, config: Recipe) -> list[tuple[str, str]]:
    """The plan in words, as (name, text)."""
    settings = config.encode
    lines = [
        ("images", f"{plan.images:,} in {plan.classes:,} classes; {plan.held_out:,} more are held out"),
        ("shards", f"{plan.shards:,} of at most {settings.shard_rows:,} images, {plan.pending_shards:,} to do"),
    ]
    if plan.padding > MUCH_PADDING and settings.shard_rows % settings.batch_size:
        lines.append(
            (
                "padding",
                f"{plan.padding:.0%} of the autoencoder's work: make encode.shard_rows a multiple of encode.batch_size "
                f"= {settings.batch_size}",
            )
        )
    if plan.changed:
        lines.append(("anew", f"because {'; '.join(plan.changed)}; the earlier latents are kept in superseded/"))
    if plan.pending_shards:
        lines += [("bytes", _bytes(plan)), ("time", _time(plan, config))]
    return lines


def _bytes(plan: EncodePlan) -> str:
    free = "" if plan.free_bytes is None else f"; {plan.free_bytes / 2**30:.1f} GiB free"
    if plan.bytes is None or plan.moments_shape is None:
        return f"not known: {plan.unknown}{free}"
    shape = " x ".join(map(str, plan.moments_shape))
    enough = "" if plan.free_bytes is None or plan.bytes < plan.free_bytes else ", which is not enough"
    return (
        f"{plan.bytes / 2**20:,.1f} MiB of moments ({plan.bytes_per_image:,} an image: {shape} float16){free}{enough}"
    )


def _time(plan: EncodePlan, config: Recipe) -> str:
    to_read, to_encode = plan.seconds_to_read, plan.seconds_to_encode
    if plan.seconds is None or to_read is None or to_encode is None:
        return f"no estimate: {plan.unknown}"
    minutes, seconds = divmod(round(plan.seconds), 60)
    settings = config.encode
    return (
        f"about {minutes // 60}:{minutes % 60:02d}:{seconds:02d} at {plan.images_per_second:.1f} images/s by "
        f"{settings.num_workers} worker(s), not counting the start (measured here: {to_read * 1e3:.1f} ms "
        f"to read an image, {to_encode * 1e3:.1f} ms to encode it)"
    )
