"""What `raydit encode` would do: the plan that `--dry-run` prints. Writes nothing and starts no Ray."""

import os
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cluster import storage
from dit.autoencoders.kinds import describe_shape
from pipelines.artifacts import Artifact
from pipelines.config.encode import EncodeConfig
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.held_out import split_images
from pipelines.images.preprocess import read_cropped
from pipelines.images.validation import held_out_source
from pipelines.latents import schema
from pipelines.latents.autoencoder import AutoencoderHandle, autoencoder_of
from pipelines.latents.dataset import MANIFEST, LatentDataset
from pipelines.latents.encoding import EncodeImages
from pipelines.latents.held_out import ImageSet, held_out_set, require_held_out, require_training, training_set
from pipelines.latents.identity import describe_latents
from pipelines.latents.quarantine import most_unusable
from pipelines.latents.recorded_autoencoder import as_recorded
from pipelines.latents.recorded_images import list_images, require_classes
from pipelines.latents.shards import IMAGE_FIELDS, LatentShard, divide_shards, inspect_existing, plan_shards
from pipelines.planning.networks import autoencoder_config
from pipelines.planning.render import format_bytes, format_duration
from raydit.errors import NotFound

MEASURED_IMAGES = 64
"""Images that are read and encoded to measure the speed."""
MEASURED_SECONDS = 3.0
"""Seconds for which encoding is repeated to measure its speed."""
CPU_BATCH = 4
"""Largest batch of the measurement on a CPU, where the time per image hardly depends on the batch."""
PADDING_WARNING = 0.1
"""Share of padding above which the plan suggests another shard size."""


@dataclass(frozen=True)
class EncodePlan:
    """What there is to encode. A figure that is not known yet is None; `unknown` says why."""

    images: int
    """Training images of the source."""
    held_out: int
    classes: int
    shards: int
    pending_shards: int
    """Shards that are still to be encoded."""
    pending_images: int
    """Images of the pending shards."""
    changed: list[str]
    """Why existing latents do not count and would be moved to superseded/."""
    padding: float
    """Share of the autoencoder's work that pads the last batches of shards."""
    moments_shape: tuple[int, int, int] | None
    bytes_per_image: int | None
    """Bytes of a training image's moments, or of what names it where they are not stored; its key and Parquet's own
    structures add some dozens."""
    free_bytes: int | None
    """Free space where the latents go."""
    seconds_to_read: float | None = None
    """Measured CPU seconds to read and crop one image."""
    seconds_to_encode: float | None = None
    """Measured seconds of one worker to encode one image, with its horizontal flip if the recipe stores that."""
    images_per_second: float | None = None
    """Images per second of all workers."""
    unknown: str = ""
    notes: tuple[str, ...] = ()
    """Notices for the user about images and classes, as sentences."""
    pending_held_out: int | None = None
    """Held-out images that are still to be encoded; None if the recipe does not encode them."""
    bytes_per_held_out: int | None = None
    """Bytes of a held-out image's moments, which are always stored."""

    @property
    def images_to_encode(self) -> int:
        """Images of all pending shards, held-out ones included."""
        return self.pending_images + (self.pending_held_out or 0)

    @property
    def bytes(self) -> int | None:
        """Bytes that are still to be written."""
        if self.bytes_per_image is None or self.bytes_per_held_out is None:
            return None
        return self.bytes_per_image * self.pending_images + self.bytes_per_held_out * (self.pending_held_out or 0)

    @property
    def seconds(self) -> float | None:
        """Seconds to encode the pending images."""
        return None if self.images_per_second is None else self.images_to_encode / self.images_per_second


def make_encode_plan(config: Recipe) -> EncodePlan:
    """Plan the encode job of a recipe. Raises what the job would raise if there are no images."""
    config, images = list_images(config)
    listing, held_out = split_images(config.images, images)
    require_training(config, listing)
    require_classes(config, listing.class_names, listing.columns, config.latents)
    require_held_out(config, held_out)
    autoencoder, unknown = describe_local_autoencoder(config)
    changed, num_shards, pending, taken_back = plan_set(training_set(config, listing), config.encode, autoencoder)
    pending_held_out: list[LatentShard] = []
    if config.encodes_held_out:
        pending_held_out = plan_set(held_out_set(config, held_out), config.encode, autoencoder).pending
    description = None
    if autoencoder:
        description = describe_latents(config.images, config.encode, listing.class_names, autoencoder)
    plan = EncodePlan(
        images=len(listing),
        held_out=len(held_out),
        classes=len(listing.class_names),
        shards=num_shards,
        pending_shards=len(pending),
        pending_images=_count_images(pending),
        changed=changed,
        padding=padding_share(pending, config.encode.batch_size),
        moments_shape=description.moments_shape if description else None,
        bytes_per_image=description.row_bytes if description else None,
        free_bytes=storage.free_bytes(config.latents),
        unknown=unknown,
        notes=(*listing.describe_classes(), *_describe_taken_back(taken_back)),
        pending_held_out=_count_images(pending_held_out) if config.encodes_held_out else None,
        bytes_per_held_out=schema.moments_bytes(description.moments_shape, config.encode.flip) if description else None,
    )
    if unknown or not plan.images_to_encode:
        return plan
    source = config.images if pending else held_out_source(config.images)
    return _with_speed(plan, config, source, [*pending, *pending_held_out][0])


class SetPlan(NamedTuple):
    """What the encode job will do with the images of one data set."""

    changed: list[str]
    """Why existing latents do not count."""
    num_shards: int
    pending: list[LatentShard]
    """The shards that are still to be encoded."""
    taken_back: str | None
    """The folder of superseded latents that the job will reuse; None if there is none."""


def plan_set(image_set: ImageSet, settings: EncodeConfig, autoencoder: dict[str, Any]) -> SetPlan:
    """Plan the encoding of one data set. autoencoder: its record, or what is known of it."""
    folder, listing, changed, finished, taken_back = image_set.folder, image_set.listing, [], 0, None
    earlier: LatentDataset | None = None
    shards = plan_shards(folder, listing, None, settings.shard_rows)
    if "sha256" in autoencoder:
        artifact = image_set.artifact(settings, autoencoder)
        earlier, lost = inspect_existing(folder, artifact.identity, listing)
        changed = artifact.changes(() if lost else IMAGE_FIELDS) + lost
        if taken_back := find_taken_back(artifact, changed):
            folder, changed = taken_back, []
            earlier, _ = inspect_existing(folder, artifact.identity, listing)
        if not changed:
            finished = len(earlier.shards) if earlier else 0
            shards = plan_shards(folder, listing, earlier, settings.shard_rows)
    if changed:
        return SetPlan(changed, len(shards), shards, taken_back)
    pending, _ = divide_shards(shards, earlier, most_unusable(settings.max_quarantined, len(listing)))
    return SetPlan(changed, finished + len(shards), pending, taken_back)


def find_taken_back(artifact: Artifact, changed: list[str]) -> str | None:
    """Return the folder of superseded latents that the job will reuse instead of encoding again; None if there is none.

    changed: why the latents in the folder do not count.
    """
    if not changed and artifact.recorded() is not None:
        return None
    finished = artifact.find_superseded(lambda folder: storage.exists(storage.join(folder, MANIFEST)))
    return finished or artifact.find_superseded()


def _describe_taken_back(folder: str | None) -> list[str]:
    return [f"latents of these settings are in {folder}, and are taken back"] if folder else []


def padding_share(shards: list[LatentShard], batch_size: int) -> float:
    """Return the share of padding in the images of all batches; a batch never holds images of two shards."""
    images = _count_images(shards)
    padded = sum(-(-len(shard.images) // batch_size) * batch_size for shard in shards)
    return 1 - images / padded if padded else 0.0


def _count_images(shards: list[LatentShard]) -> int:
    return sum(len(shard.images) for shard in shards)


def describe_local_autoencoder(config: Recipe) -> tuple[dict[str, Any], str]:
    """Return what is known of the autoencoder without a download, and why it cannot be measured, if it cannot."""
    try:
        handle = autoencoder_of(config)
        return as_recorded(handle.describe(download=False), handle.folder(download=False), config.latents), ""
    except FileNotFoundError as error:
        own = config.autoencoder.train
        unknown = (
            f"the autoencoder is trained first ({error})" if own else f"{config.autoencoder.id} is not on this machine"
        )
    try:
        found = autoencoder_config(config.autoencoder)
    except NotFound:
        return {}, unknown
    return describe_shape(found), unknown


def _with_speed(plan: EncodePlan, config: Recipe, source: ImagesConfig, shard: LatentShard) -> EncodePlan:
    """Return the plan with the speed at which this process reads and encodes some images of a shard.

    source: by which the images are read.
    """
    import torch

    settings = config.encode
    if settings.gpus_per_worker and not torch.cuda.is_available():
        return replace(plan, unknown="encode.gpus_per_worker is set, and this machine has no GPU to measure on")
    first = shard.images.take(range(min(MEASURED_IMAGES, len(shard.images))))
    started = time.perf_counter()
    images, _, _ = read_cropped(source, first.keys, first.locations)
    read = (time.perf_counter() - started) / len(first)
    if not len(images):
        return replace(plan, unknown=f"none of the first {len(first)} images can be read")
    encode = _seconds_to_encode(autoencoder_of(config), settings, images)
    cores = os.cpu_count() or 1
    core_seconds = read + (0 if settings.gpus_per_worker else encode * settings.cpus_per_worker)
    rate = 1 / max(encode / settings.num_workers, core_seconds / cores)
    return replace(plan, seconds_to_read=read, seconds_to_encode=encode, images_per_second=rate)


def _seconds_to_encode(autoencoder: AutoencoderHandle, settings: EncodeConfig, images: np.ndarray) -> float:
    """Return the seconds of one worker per image, with its flip if that is stored, after a warm-up."""
    if not settings.gpus_per_worker:
        settings = replace(settings, batch_size=min(settings.batch_size, CPU_BATCH))
    worker = EncodeImages(autoencoder, settings)
    batch = np.resize(images, (settings.batch_size, *images.shape[1:]))
    worker.encode_with_flip(batch[:1])
    batches, started = 0, time.perf_counter()
    while batches == 0 or time.perf_counter() - started < MEASURED_SECONDS:
        worker.encode_with_flip(batch)
        batches += 1
    return (time.perf_counter() - started) / batches / len(batch)


def encode_plan_lines(plan: EncodePlan, settings: EncodeConfig) -> list[tuple[str, str]]:
    """Return the plan as pairs of a short label and a text."""
    rows, batch = settings.shard_rows, settings.batch_size
    lines = [
        ("images", f"{plan.images:,} in {plan.classes:,} classes; {plan.held_out:,} more are held out"),
        ("shards", f"{plan.shards:,} of at most {rows:,} images, {plan.pending_shards:,} to encode"),
    ]
    if plan.pending_held_out is not None:
        lines.append(("held out", f"{plan.held_out:,} images for validation, {plan.pending_held_out:,} to encode"))
    lines += [("note", note) for note in plan.notes]
    if plan.padding > PADDING_WARNING and rows % batch:
        advice = f"make encode.shard_rows a multiple of encode.batch_size = {batch}"
        lines.append(("padding", f"{plan.padding:.0%} of the autoencoder's work: {advice}"))
    if plan.changed:
        reasons = "; ".join(plan.changed)
        lines.append(("start over", f"because {reasons}; the earlier latents are kept in superseded/"))
    if plan.images_to_encode:
        lines += [("bytes", _bytes(plan, settings.stores_moments)), ("time", _time(plan, settings.num_workers))]
    return lines


def _bytes(plan: EncodePlan, stores_moments: bool) -> str:
    free = "" if plan.free_bytes is None else f"; {format_bytes(plan.free_bytes)} free"
    if plan.bytes is None or plan.moments_shape is None:
        return f"unknown: {plan.unknown}{free}"
    shape = " x ".join(map(str, plan.moments_shape))
    short = "" if plan.free_bytes is None or plan.bytes < plan.free_bytes else ", which is not enough"
    if not stores_moments:
        return f"{format_bytes(plan.bytes)} without the moments of training images ({shape} float16 each){free}{short}"
    return f"{format_bytes(plan.bytes)} of moments ({plan.bytes_per_image:,} per image: {shape} float16){free}{short}"


def _time(plan: EncodePlan, workers: int) -> str:
    if plan.seconds is None or plan.seconds_to_read is None or plan.seconds_to_encode is None:
        return f"no estimate: {plan.unknown}"
    read, encode = plan.seconds_to_read * 1e3, plan.seconds_to_encode * 1e3
    speed = f"{plan.images_per_second:.1f} images/s by {workers} worker(s), not counting the start"
    measured = f"measured here: {read:.1f} ms to read an image, {encode:.1f} ms to encode it"
    return f"about {format_duration(plan.seconds)} at {speed} ({measured})"
