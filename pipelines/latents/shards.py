"""What an encode job has to do: its shards, which of them are finished, and the data set that they are added to.

A shard is finished when its record is written, which happens after its file is; whatever was cut off is done again.
A record tells which images it is of, so that it counts for no other plan.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np

from cluster import storage
from evaluation.protocol import shard_ranges
from pipelines.artifacts import Artifact
from pipelines.images.listing import Listing
from pipelines.latents import schema
from pipelines.latents.dataset import MANIFEST, LatentDataset

RECORDS = ".records"
IMAGES = ("images.digest", "images.count")
"""What may change of an identity where the images of before are still the same."""


@dataclass(frozen=True)
class LatentShard:
    """Some consecutive images of the source's listing, and one file."""

    folder: str
    """Of the data set; path or URI."""
    index: int
    images: Listing

    @property
    def file(self) -> str:
        return storage.join(self.folder, shard_name(self.index))

    def task(self) -> dict:
        """The work as a row of a Ray data set."""
        images = self.images
        task = {"shard": self.index, "listing": images.digest, "keys": list(images.keys), "labels": images.labels}
        return task if images.locations is None else {**task, "locations": images.locations}


def shard_name(index: int) -> str:
    """Of a shard's Parquet file."""
    return f"part-{index:05d}.parquet"


def record_name(index: int) -> str:
    """Of the record that says that it is finished."""
    return f"part-{index:05d}.json"


def write_shard(folder: str, index: int, data: bytes, record: dict) -> None:
    """Write the file, then its record, each atomically. Never is there a record beside another plan's file."""
    path = storage.join(folder, RECORDS, record_name(index))
    if storage.exists(path) and storage.read_json(path)["listing"] != record["listing"]:
        storage.remove_file(path)
    storage.write_atomically(storage.join(folder, shard_name(index)), data)
    storage.write_json_atomically(path, record)


def read_records(shards: Sequence[LatentShard]) -> list[dict | None]:
    """For each shard its record if it is finished: of these very images, and with its file whole; else None."""
    if not shards:
        return []
    folder = shards[0].folder
    records = storage.join(folder, RECORDS)
    sizes, recorded = storage.list_files(folder), storage.list_files(records)

    def read(shard: LatentShard) -> dict | None:
        name = record_name(shard.index)
        record = storage.read_json(storage.join(records, name)) if name in recorded else None
        if record is None or record["listing"] != shard.images.digest:
            return None
        return record if sizes.get(shard_name(shard.index)) == record["bytes"] else None

    with ThreadPoolExecutor(storage.MAX_CONCURRENT_REQUESTS) as pool:
        return list(pool.map(read, shards))


def plan_shards(folder: str, listing: Listing, earlier: LatentDataset | None, shard_rows: int) -> list[LatentShard]:
    """The shards of all images that `earlier` does not hold, numbered after its own: a function of these alone."""
    first, new = 0, listing
    if earlier is not None:
        first, held = len(earlier.manifest["shards"]), held_keys(earlier)
        new = listing.take(np.array([key not in held for key in listing.keys], dtype=bool))
    ranges = shard_ranges(len(new), shard_rows)
    return [LatentShard(folder, first + number, new.take(positions)) for number, positions in enumerate(ranges)]


def finished_records(shards: list[LatentShard]) -> list[dict]:
    """Records of all shards. Raises ValueError if one is gone: something else changed the folder meanwhile."""
    records = []
    for shard, record in zip(shards, read_records(shards), strict=True):
        if record is None:
            raise ValueError(
                f"{shard.file}: found no finished file and record of this shard, which was written a moment ago. "
                "Another process changes this folder; stop it and run again"
            )
        records.append(record)
    return records


def prepare_folder(folder: str, identity: dict, listing: Listing) -> LatentDataset | None:
    """Make the folder this identity's; the finished data set in it, if any, holds the listing or a part of it.

    Where nothing changed but that images were added, what is there stays. Any other change starts anew.
    """
    earlier, lost = inspect_existing(folder, identity, listing)
    Artifact("encode", folder, identity).prepare(lost, free=() if lost else IMAGES)
    return earlier if earlier is not None and storage.exists(storage.join(folder, MANIFEST)) else None


def inspect_existing(folder: str, identity: dict, listing: Listing) -> tuple[LatentDataset | None, list[str]]:
    """The finished data set in a folder, if any, and why a listing's images cannot be added to it, if so."""
    if not storage.exists(storage.join(folder, MANIFEST)):
        return None, []
    earlier = LatentDataset.open(folder)
    before = earlier.manifest["identity"]["images"]
    if before["digest"] == identity["images"]["digest"]:
        return earlier, []
    held = held_keys(earlier)
    kept = listing.take(np.array([key in held for key in listing.keys], dtype=bool))
    if gone := sorted(held.difference(kept.keys)):
        return earlier, [f"{len(gone):,} images are gone, such as {gone[0]}"]
    # Equal to what was recorded of them, labels and stamps and all, though others now lie in between.
    return earlier, [] if kept.digest == before["digest"] else ["images, their labels or class names have changed"]


def held_keys(dataset: LatentDataset) -> set[str]:
    """Keys of all images that a data set has seen: its rows and its quarantine."""
    keys = {entry["key"] for entry in dataset.quarantined()}
    for table in dataset.tables([schema.KEY]):
        keys.update(table.column(schema.KEY).to_pylist())
    return keys


def remove_strays(folder: str, shards: list[LatentShard], earlier: LatentDataset | None) -> None:
    """Remove files of plans that are no more: no manifest names them, and `part-*.parquet` would read them."""
    kept = {shard_name(shard.index) for shard in shards}
    if earlier is not None:
        kept |= {shard["file"] for shard in earlier.manifest["shards"]}
    for name in shard_files(folder):
        if name not in kept:
            storage.remove_file(storage.join(folder, name))


def shard_files(folder: str) -> list[str]:
    """Names of all files that look like shards, whether or not they are of a data set: other tools read them."""
    return [name for name in storage.list_files(folder) if fnmatch(name, "part-*.parquet")]
