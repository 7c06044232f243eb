"""The encode job: images -> moments in Parquet, exactly once, by Ray Data.

The unit of work and of resuming is a shard: a fixed part of the source's listing, and one file.
"""

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict

from cluster import storage
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.images.listing import Listing
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset, write_manifest
from pipelines.latents.encoding import (
    EncodeImages,
    ReadImages,
    WriteShard,
    bytes_in_flight,
    describe_latents,
    encode_identity,
)
from pipelines.latents.quarantine import QuarantineLimit
from pipelines.latents.shards import (
    RECORDS,
    LatentShard,
    finished_records,
    plan_shards,
    prepare_folder,
    read_records,
    remove_strays,
)
from pipelines.stage import StageContext, job

SHARDS_IN_FLIGHT = 16
"""Shards for each worker that the object store holds at most: being read, waiting, being encoded, being written.

Ray Data shares them out among its operators beforehand: of fewer, too few are read, and the autoencoder waits.
"""


@job
def encode(config: Recipe, *, context: StageContext) -> LatentDataset:
    """Encode the training images of a recipe, or the part of them that is still missing."""
    folder = config.latents
    listing, _ = open_source(config.images).listing().split(config.images.held_out)
    autoencoder = autoencoder_of(config).describe()
    identity = encode_identity(config, listing, autoencoder)
    earlier = prepare_folder(folder, identity, listing)
    if earlier is not None and earlier.manifest["identity"]["images"]["digest"] == listing.digest:
        context.skipped("encode", summary(earlier))
        return earlier

    description = describe_latents(config, listing, autoencoder)
    shards = plan_shards(folder, listing, earlier, config.encode.shard_rows)
    if earlier is not None:
        context.say("encode", f"adds {sum(len(shard.images) for shard in shards):,} images to {summary(earlier)}")
    with context.run("encode", identity) as run:
        run.params({"images": asdict(config.images), "encode": asdict(config.encode)})
        run.input(name="images", digest=listing.digest, source=config.images.path, context="encoding")
        encode_missing(config, context, run, listing, shards, description, earlier)
        storage.remove_stale_temporaries(folder)
        remove_strays(folder, shards, earlier)
        records = finished_records(shards)
        dataset = write_manifest(folder, description, identity, records, recipe=resolved(config), earlier=earlier)
        storage.remove_folder(storage.join(folder, RECORDS))
        context.say("encode", summary(dataset))
        run.tag("raydit.latents_fingerprint", dataset.fingerprint)
        run.tag("raydit.latents", dataset.path)
    return dataset


def encode_missing(config, context, run, listing: Listing, shards, description, earlier) -> None:
    """See to it that every shard is finished, and say how it goes."""
    unusable = QuarantineLimit(config.latents, config.encode.max_quarantined, len(listing))
    unusable.add(earlier.quarantined() if earlier is not None else [])
    pending = []
    for shard, record in zip(shards, read_records(shards), strict=True):
        if record is None:
            pending.append(shard)
        else:
            unusable.add(record["quarantined"])
    done = len(listing) - sum(len(shard.images) for shard in pending)
    progress = context.progress("encode", total=len(listing), unit="images", start=done)
    with closing(encode_shards(config, context, pending, description)) as records:
        for record in records:
            unusable.add(record["quarantined"])
            progress.advance(record["rows"] + len(record["quarantined"]))
            run.metrics(
                {
                    "encode/images": progress.count - len(unusable.entries),
                    "encode/quarantined": len(unusable.entries),
                    "encode/images_per_second": progress.rate,
                },
                step=progress.count,
            )


def encode_shards(
    config: Recipe, context: StageContext, shards: list[LatentShard], description: dict
) -> Generator[dict, None, None]:
    """The graph: shards -> decoded and cropped images -> moments -> one Parquet file each -> records."""
    if not shards:
        return
    workers = config.encode
    ray_data = context.ray_data(workers, "encode")
    records = (
        ray_data.from_items([shard.task() for shard in shards], override_num_blocks=len(shards))
        .map(ReadImages(with_absolute_paths(config.images)), num_cpus=1)
        .map(
            EncodeImages,
            fn_constructor_args=(autoencoder_of(config).with_absolute_paths(), config.encode),
            # Two calls, of which one encodes at a time: the other takes in its images or hands over its moments.
            compute=ray_data.ActorPoolStrategy(size=workers.num_workers, max_concurrent_calls_per_actor=2),
            # Half a CPU: actors that hold every CPU leave none to read and write with, and the job hangs.
            num_cpus=0.5,
            num_gpus=workers.gpus_per_worker,
            **workers.placement,
        )
        .map(WriteShard(config.latents, description), num_cpus=0.5)
    )
    # Reading is faster than encoding: without a limit it runs ahead until half of the object store is full.
    limits = ray_data.ExecutionResources.for_limits(
        object_store_memory=SHARDS_IN_FLIGHT * workers.num_workers * bytes_in_flight(config, description)
    )
    records.context.execution_options.resource_limits = limits
    yield from (json.loads(row["record"]) for row in records.iter_rows())


def summary(dataset: LatentDataset) -> str:
    """One line for people."""
    manifest = dataset.manifest
    bad = f", {manifest['quarantined']} quarantined (see quarantine.parquet)" if manifest["quarantined"] else ""
    return f"{len(dataset):,} latents{bad}, {dataset.num_bytes / 2**20:.1f} MiB in {dataset.path}"
