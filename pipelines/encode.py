"""The encode job: images to moments in Parquet, each image exactly once, by Ray Data.

The unit of work and of resuming is a shard: a fixed part of the source's listing, and one file. With encode.store =
false, the job goes through the same images, finds those that cannot be used and measures the latents' statistics, and
its shards identify the images instead of storing their moments, which training then computes.
"""

import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.stderr_filter import hide_stderr_lines
from pipelines.artifacts import Artifact
from pipelines.config.encode import EncodeConfig
from pipelines.config.reader import resolved
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.console import Progress, counted, first_line
from pipelines.images.held_out import split_images
from pipelines.images.open import with_absolute_paths
from pipelines.latents.autoencoder import AutoencoderHandle, autoencoder_of
from pipelines.latents.dataset import MANIFEST, LatentDataset, write_manifest
from pipelines.latents.encoding import (
    EncodeImages,
    ReadImages,
    WriteShard,
    bytes_in_flight,
    device_without_tf32,
    explain_faster_encoding,
)
from pipelines.latents.held_out import ImageSet, held_out_set, require_held_out, require_training, training_set
from pipelines.latents.identity import (
    ENCODE_FIELDS,
    OPTIONAL_ENCODE_FIELDS,
    PREPROCESSING_FIELDS,
    describe_latents,
)
from pipelines.latents.quarantine import QuarantineLimit
from pipelines.latents.recorded_autoencoder import as_recorded
from pipelines.latents.recorded_images import KEPT_READING, list_images, require_classes
from pipelines.latents.records import ShardRecord
from pipelines.latents.shards import (
    RECORDS,
    LatentShard,
    divide_shards,
    find_finished,
    finished_records,
    has_leftovers,
    plan_shards,
    prepare_folder,
    remove_leftovers,
    remove_strays,
    settings_digest,
)
from pipelines.latents.summaries import describe_images, describe_low_values, summarize
from pipelines.stage import JobContext, job
from pipelines.tracking import tags
from pipelines.tracking.run_log import RunLog, log_sections
from raydit.errors import InUse

SHARDS_IN_FLIGHT = 16
"""Most shards per worker that the object store holds: being read, waiting, being encoded, being written.

Ray Data divides them among its operators in advance. With fewer, too few are read ahead and the autoencoder waits.
"""

RESTART_NOTICE = r"core_worker\.cc:\d+: Actor with class name: .* has constructor arguments in the object store"
"""Matches a line that Ray prints in red for every pool of Ray Data. What it warns of, that an actor cannot restart when
the node with its arguments is lost, ends the job, and the same command then resumes."""


@job
def encode(config: Recipe, *, context: JobContext) -> LatentDataset:
    """Encode the training images of a recipe into latents, skipping what earlier runs have finished.

    Then encodes the held-out images as well, into a data set of their own, if the recipe validates. Images that were
    added since then become new shards of the same data set; any other change starts a new one and moves the old one to
    superseded/, unless the stage cannot run. Raises InvalidInput if the autoencoder does not fit the images, or if more
    images than encode.max_quarantined are unusable.
    """
    from dit.autoencoder import check_autoencoder  # imports torch

    given = config.images.reading
    config, images = list_images(config)
    if config.images.reading != given:
        context.say("encode", KEPT_READING)
    listing, held_out = split_images(config.images, images)
    require_training(config, listing)
    require_classes(config, listing.class_names, listing.columns, config.latents)
    require_held_out(config, held_out)
    autoencoder = autoencoder_of(config)
    record = as_recorded(autoencoder.describe(), autoencoder.folder(), config.latents)
    check_autoencoder(autoencoder.folder())
    lines = [*describe_images(config, images, listing, autoencoder), *explain_faster_encoding(config.encode)]
    dataset = encode_images(context, config, training_set(config, listing), autoencoder, record, lines)
    if config.encodes_held_out:
        image_set = held_out_set(config, held_out)
        record = as_recorded(record, autoencoder.folder(), image_set.folder)
        lines = [f"{held_out.summary()}, held out", *held_out.notes]
        encode_images(context, config, image_set, autoencoder, record, lines)
    return dataset


def encode_images(
    context: JobContext,
    config: Recipe,
    image_set: ImageSet,
    autoencoder: AutoencoderHandle,
    record: dict[str, Any],
    lines: Sequence[str],
) -> LatentDataset:
    """Encode the training images or the held-out images of a recipe into a latent data set, or return a finished one.

    record: the autoencoder's, as the latents know it. lines: what to say before there is work. Raises InUse if another
    process encodes into the same folder.
    """
    artifact = image_set.artifact(image_set.encode_settings(config.encode), record)
    if (finished := find_finished(artifact, image_set.listing)) is not None:
        clean_finished(context, finished)
        context.skipped("encode", summarize(finished))
        return finished
    with hold_latents(context, image_set.folder):
        return encode_pending(context, config, image_set, autoencoder, artifact, record, lines)


def clean_finished(context: JobContext, dataset: LatentDataset) -> None:
    """Remove what an abandoned attempt to add images, which are gone again, has left in the folder of a data set."""
    if not has_leftovers(dataset):
        return
    try:
        with hold_latents(context, dataset.path):
            remove_leftovers(LatentDataset.open(dataset.path))  # again: another process may just have added images
    except OSError as error:  # another process is adding images, or this one may not write there
        context.say("encode", f"files that the manifest does not list stay in {dataset.path}: {first_line(error)}")


@contextmanager
def hold_latents(context: JobContext, folder: str) -> Iterator[None]:
    """Hold a folder of latents, which the outputs of several recipes may share. Raises InUse.

    The lease lies in a folder beside the latents, because these may be moved to superseded/ in the meantime.
    """
    parent, name = storage.split(folder)
    if storage.is_local(parent) and not os.access(storage.nearest_folder(parent), os.W_OK):
        yield  # a mount, beside which nothing can be written
        return
    try:
        with context.holding_folder(storage.join(parent, f".{name}.lease"), field="encode.output"):
            yield
    except InUse as error:
        raise InUse(f"latents at {folder}: {error.found}", error.expected, error.do) from None


def encode_pending(
    context: JobContext,
    config: Recipe,
    image_set: ImageSet,
    autoencoder: AutoencoderHandle,
    artifact: Artifact,
    record: dict[str, Any],
    lines: Sequence[str],
) -> LatentDataset:
    """Encode what is not finished of a latent data set, whose folder this process holds. Arguments: `encode_images`'s.

    artifact: the latents.
    """
    from dit.formats.autoencoder_digests import further_digests  # imports torch

    folder, listing, settings = image_set.folder, image_set.listing, image_set.encode_settings(config.encode)
    identity, digest = artifact.identity, settings_digest(artifact)
    description = describe_latents(image_set.images, settings, listing.class_names, record)
    earlier = prepare_folder(artifact, listing, lambda: context.prepare_work(settings, "encode"))
    if earlier is not None and earlier.identity["images"]["digest"] == listing.digest:
        remove_leftovers(earlier)
        context.skipped("encode", summarize(earlier))
        return earlier

    digests = further_digests(autoencoder.folder())
    shards = plan_shards(folder, listing, earlier, settings.shard_rows, digest)
    for line in lines:
        context.say("encode", line)
    if earlier is not None:
        context.say("encode", f"adds {counted(total_images(shards), 'image')} to {summarize(earlier)}")
    context.prepare_work(settings, "encode")
    with context.run("encode", identity) as run:
        log_encode_settings(run, config, settings, image_set)
        limit = QuarantineLimit(folder, settings.max_quarantined, len(listing))
        pending, quarantined = divide_shards(shards, earlier, limit.allowed)
        limit.add(quarantined)
        done = len(listing) - total_images(pending)
        progress = context.progress("encode", total=len(listing), unit="images", start=done)
        recorded = description.autoencoder | digests
        shared = storage.mark_folder(storage.join(folder, RECORDS)) if pending else None
        write = WriteShard(folder, description, digest, shared)
        records = encode_shards(context, pending, image_set.images, autoencoder, recorded, settings, write)
        with closing(records):
            log_progress(records, limit, progress, run, image_set.metric)
        finished = finished_records(shards)
        if dark := sum(record.num_low for record in finished):
            context.say("encode", describe_low_values(dark))

        storage.remove_stale_temporaries(folder)
        remove_strays(folder, shards, earlier)
        dataset = write_manifest(
            folder,
            description,
            identity,
            finished,
            recipe=resolved(config),
            earlier=earlier,
            further_digests=digests,
        )
        storage.remove_folder(storage.join(folder, RECORDS))
        context.say("encode", summarize(dataset))
        run.tag(tags.LATENTS_FINGERPRINT, dataset.fingerprint)
        run.tag(tags.LATENTS, dataset.path)
    return dataset


def log_encode_settings(run: RunLog, config: Recipe, settings: EncodeConfig, image_set: ImageSet) -> None:
    """Log what identifies latents, what may be another when encoding resumes, and the images as an input."""
    sections = {"images": asdict(config.images), "encode": resolved(replace(config, encode=settings))["encode"]}
    other_images = sections["images"].keys() - PREPROCESSING_FIELDS
    other_encode = sections["encode"].keys() - {*ENCODE_FIELDS, *OPTIONAL_ENCODE_FIELDS}
    log_sections(run, sections, may_change={"images": other_images, "encode": other_encode})
    run.input(name=image_set.name, digest=image_set.listing.digest, source=image_set.images.path, context="encoding")


def find_latents(config: Recipe, image_set: ImageSet, autoencoder: Path) -> LatentDataset | None:
    """Return the finished latents of some images, which may have been superseded; None if there is work to do.

    autoencoder: its local folder.
    """
    from dit.autoencoder import describe_autoencoder  # imports torch

    record = as_recorded(describe_autoencoder(autoencoder), autoencoder, config.latents)
    if image_set.folder != config.latents:
        record = as_recorded(record, autoencoder, image_set.folder)
    found = image_set.artifact(config.encode, record).find(
        lambda folder: storage.exists(storage.join(folder, MANIFEST))
    )
    dataset = None if found is None else LatentDataset.open(found)
    # Until images that were added are encoded, the manifest is that of the data set before.
    return dataset if dataset and dataset.identity["images"]["digest"] == image_set.listing.digest else None


def encode_shards(
    context: JobContext,
    shards: Sequence[LatentShard],
    images: ImagesConfig,
    autoencoder: AutoencoderHandle,
    recorded: Mapping[str, Any],
    settings: EncodeConfig,
    write: WriteShard,
) -> Generator[ShardRecord, None, None]:
    """Run the graph: shards -> decoded and cropped images -> moments -> a Parquet file each. Yields their records.

    recorded: the autoencoder's record. Ray is started only if there are shards.
    """
    if not shards:
        return
    ray_data = context.ray_data(settings, "encode")
    if device_name := device_without_tf32(settings):
        context.say("encode", f"encode.dtype = 'tf32': {device_name} has no TF32, so encoding continues in float32")
    records = (
        ray_data.from_items([shard.task() for shard in shards], override_num_blocks=len(shards))
        .map(ReadImages(with_absolute_paths(images), write.shared), num_cpus=1)
        .map(
            EncodeImages,
            fn_constructor_args=(autoencoder.with_absolute_paths(), settings, recorded),
            # Two concurrent calls, only one of which encodes: the other receives images or passes on moments.
            compute=ray_data.ActorPoolStrategy(size=settings.num_workers, max_concurrent_calls_per_actor=2),
            # Half a CPU: actors that hold every CPU leave none to read and write with, and the job hangs.
            num_cpus=0.5,
            num_gpus=settings.gpus_per_worker,
            **settings.placement,
        )
        .map(write, num_cpus=0.5)
    )
    # Reading is faster than encoding: without a limit it runs ahead until half of the object store is full.
    in_flight = SHARDS_IN_FLIGHT * settings.num_workers * bytes_in_flight(write.description, settings.shard_rows)
    records.context.execution_options.resource_limits = ray_data.ExecutionResources.for_limits(
        object_store_memory=in_flight
    )
    rows = iter(records.iter_rows())
    with hide_stderr_lines(RESTART_NOTICE):  # actors start before the first row is there
        first = next(rows)
    yield from (ShardRecord.from_json(json.loads(row["record"])) for row in chain([first], rows))


def log_progress(
    records: Iterable[ShardRecord], limit: QuarantineLimit, progress: Progress, run: RunLog, metric: str
) -> None:
    """Count images as shards finish, show them and log them. Raises InvalidInput if too many are unusable.

    metric: name of the number of encoded images.
    """
    for record in records:
        limit.add(record.quarantined)
        progress.advance(record.rows + len(record.quarantined))
        run.metrics(
            {
                metric: progress.count - len(limit.images),
                "encode/quarantined": len(limit.images),
                "encode/images_per_second": progress.rate,
            },
            step=progress.count,
        )


def total_images(shards: Sequence[LatentShard]) -> int:
    """Return the number of images in some shards."""
    return sum(len(shard.images) for shard in shards)
