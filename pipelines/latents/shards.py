"""The work of an encode job: its shards, which of them are finished, and the data set to which they are added.

A shard is finished when its record is written, which happens after its file is written; a shard that was interrupted
is encoded again. A record names the images and the settings it is valid for, so that no other plan takes it for its
own.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NotRequired, TypedDict

import numpy as np

from cluster import storage
from evaluation.protocol import shard_ranges
from pipelines.artifacts import Artifact, digest_of, without_defaults
from pipelines.console import counted
from pipelines.images.listing import Listing
from pipelines.latents import schema
from pipelines.latents.dataset import MANIFEST, LatentDataset
from pipelines.latents.records import QuarantinedImage, ShardRecord
from raydit.errors import InvalidInput

RECORDS = ".records"
"""Folder of the records in the data set's folder."""
IMAGE_FIELDS = ("images.digest", "images.count")
"""Fields of the identity that may change if images were only added."""


class ShardTask(TypedDict):
    """The work of one shard, as a row of Ray Data."""

    shard: int
    """Number of the shard."""
    listing: str
    """Digest of the listing of its images."""
    keys: list[str]
    labels: np.ndarray
    """int32 (N,)."""
    locations: NotRequired[np.ndarray]
    """`Listing.locations`, if the listing has any."""


@dataclass(frozen=True)
class LatentShard:
    """Some consecutive images of a listing, whose moments go to one file."""

    folder: str
    """Path or URI of the data set."""
    index: int
    images: Listing
    settings: str | None = None
    """`settings_digest` of the latents; None if it is not known."""

    @property
    def file(self) -> str:
        """Path or URI of its Parquet file."""
        return storage.join(self.folder, shard_name(self.index))

    def task(self) -> ShardTask:
        """Return the work as a row of Ray Data."""
        images = self.images
        task = ShardTask(shard=self.index, listing=images.digest, keys=list(images.keys), labels=images.labels)
        if images.locations is not None:
            task["locations"] = images.locations
        return task


def shard_name(index: int) -> str:
    """Return the name of a shard's Parquet file."""
    return f"part-{index:05d}.parquet"


def record_name(index: int) -> str:
    """Return the name of the file that records that a shard is finished."""
    return f"part-{index:05d}.json"


def write_shard(folder: str, index: int, data: bytes, record: ShardRecord) -> None:
    """Write a shard's file, then its record, each atomically.

    An earlier record is removed first: it is of another plan, or of the same images before some were repaired, and must
    never stand for this file.
    """
    path = storage.join(folder, RECORDS, record_name(index))
    if storage.exists(path):
        storage.remove_file(path)
    storage.write_atomically(storage.join(folder, shard_name(index)), data)
    storage.write_json_atomically(path, record.to_json())


def read_shard_records(shards: Sequence[LatentShard]) -> list[ShardRecord | None]:
    """Return the record of each shard, or None if it is not finished.

    A record counts if it is valid for the shard's images and settings and the file has the recorded length.
    """
    if not shards:
        return []
    folder = shards[0].folder
    records = storage.join(folder, RECORDS)
    sizes, recorded = storage.list_files(folder), storage.list_files(records)

    def read(shard: LatentShard) -> ShardRecord | None:
        name = record_name(shard.index)
        content = storage.read_json(storage.join(records, name)) if name in recorded else None
        if content is None or not _is_valid_for(content, shard.images.digest, shard.settings):
            return None
        record = ShardRecord.from_json(content)
        return record if sizes.get(shard_name(shard.index)) == record.bytes else None

    with ThreadPoolExecutor(storage.MAX_CONCURRENT_REQUESTS) as pool:
        return list(pool.map(read, shards))


def divide_shards(
    shards: Sequence[LatentShard], earlier: LatentDataset | None, allowed: int
) -> tuple[list[LatentShard], list[QuarantinedImage]]:
    """Return the shards that are to be encoded, and the unusable images of all others and of `earlier`.

    allowed: number of unusable images that do not stop the job. If more are recorded, the shards that they are in are
    encoded again: the images may have been repaired since, which neither their names nor their lengths need to show.
    """
    records = read_shard_records(shards)
    quarantined = earlier.read_quarantine() if earlier is not None else []
    num_recorded = len(quarantined) + sum(len(record.quarantined) for record in records if record)
    pending = []
    for shard, record in zip(shards, records, strict=True):
        if record is None or (record.quarantined and num_recorded > allowed):
            pending.append(shard)
        else:
            quarantined += record.quarantined
    return pending, quarantined


def _is_valid_for(record: dict[str, Any], listing: str, settings: str | None) -> bool:
    """Return whether a shard's record is of some images and settings; records of earlier releases name only images."""
    recorded = record.get("settings")
    return record["listing"] == listing and (None in (recorded, settings) or recorded == settings)


def settings_digest(artifact: Artifact) -> str:
    """Return the digest of the identity of latents without their images, which each shard names itself."""
    identity = without_defaults(json.loads(json.dumps(artifact.identity)), artifact.defaults)
    left_out = (*IMAGE_FIELDS, *artifact.later_fields)
    images = {name: value for name, value in identity["images"].items() if f"images.{name}" not in left_out}
    return digest_of({**identity, "images": images})


def finished_records(shards: Sequence[LatentShard]) -> list[ShardRecord]:
    """Return the records of all shards. Raises InvalidInput if another process has removed or changed one."""
    records = []
    for shard, record in zip(shards, read_shard_records(shards), strict=True):
        if record is None:
            raise InvalidInput(
                f"{shard.file}: found no finished file and record of this shard, which has just been written",
                "no other process to be changing this folder",
                "stop the other process and run the command again",
            )
        records.append(record)
    return records


def plan_shards(
    folder: str, listing: Listing, earlier: LatentDataset | None, shard_rows: int, settings: str | None = None
) -> list[LatentShard]:
    """Divide the images that `earlier` does not hold into shards, numbered after its own.

    settings: `settings_digest` of the latents, if it is known.
    The plan is a function of the arguments alone, so that an interrupted job finds its finished shards.
    """
    first, new = 0, listing
    if earlier is not None:
        first, recorded = len(earlier.shards), recorded_keys(earlier)
        new = listing.take(np.array([key not in recorded for key in listing.keys], dtype=bool))
    ranges = shard_ranges(len(new), shard_rows)
    return [
        LatentShard(folder, first + number, new.take(positions), settings) for number, positions in enumerate(ranges)
    ]


def find_finished(artifact: Artifact, listing: Listing) -> LatentDataset | None:
    """Return the finished latents of all images in a listing; None if there is work to do. Changes nothing."""
    if artifact.recorded() is None or artifact.changes() or not _has_manifest(artifact.folder):
        return None
    dataset = LatentDataset.open(artifact.folder)
    return dataset if dataset.identity["images"]["digest"] == listing.digest else None


def prepare_folder(
    artifact: Artifact, listing: Listing, before_move: Callable[[], object] = lambda: None
) -> LatentDataset | None:
    """Prepare the folder of latents, and return the finished data set in it to which images are added.

    The data set is kept if nothing changed except that images were added. After any other change it is moved to
    superseded/, and the result is the data set of this identity that was superseded before, or None. before_move: as in
    `Artifact.prepare`. Raises InvalidInput if the folder holds other files.
    """
    _, reasons = inspect_existing(artifact.folder, artifact.identity, listing)
    may_change = () if reasons else IMAGE_FIELDS
    artifact.prepare(reasons, may_change, is_finished=_has_manifest, before_move=before_move)
    return LatentDataset.open(artifact.folder) if _has_manifest(artifact.folder) else None


def _has_manifest(folder: str) -> bool:
    return storage.exists(storage.join(folder, MANIFEST))


def inspect_existing(folder: str, identity: dict[str, Any], listing: Listing) -> tuple[LatentDataset | None, list[str]]:
    """Return the finished data set in a folder, if any, and the reasons why images cannot be added to it.

    Changes nothing. Reasons are images that were removed, or whose labels, stamps or class names changed; settings are
    compared elsewhere.
    """
    if not storage.exists(storage.join(folder, MANIFEST)):
        return None, []
    earlier = LatentDataset.open(folder)
    before = earlier.identity["images"]
    if before["digest"] == identity["images"]["digest"]:
        return earlier, []
    recorded = recorded_keys(earlier)
    present = listing.take(np.array([key in recorded for key in listing.keys], dtype=bool))
    if removed := sorted(recorded.difference(present.keys)):
        are = "is" if len(removed) == 1 else "are"
        return earlier, [f"{counted(len(removed), 'image')} {are} gone, such as {removed[0]}"]
    # The digest covers labels and stamps as well, and does not depend on images listed in between.
    unchanged = present.digest == before["digest"]
    return earlier, [] if unchanged else ["images, their labels or class names have changed"]


def recorded_keys(dataset: LatentDataset) -> set[str]:
    """Return the keys of all images that a data set has rows of or quarantined."""
    keys = {image.key for image in dataset.read_quarantine()}
    for table in dataset.tables([schema.KEY]):
        keys.update(table.column(schema.KEY).to_pylist())
    return keys


def remove_strays(folder: str, shards: Sequence[LatentShard], earlier: LatentDataset | None) -> None:
    """Remove shard files of abandoned plans, which other tools would read by the pattern `part-*.parquet`."""
    valid = {shard_name(shard.index) for shard in shards}
    if earlier is not None:
        valid |= {shard.file for shard in earlier.shards}
    for name in shard_files(folder):
        if name not in valid:
            storage.remove_file(storage.join(folder, name))


def has_leftovers(dataset: LatentDataset) -> bool:
    """Return whether a finished data set's folder holds files of an abandoned attempt to add images."""
    listed = {shard.file for shard in dataset.shards}
    return storage.exists(storage.join(dataset.path, RECORDS)) or not listed.issuperset(shard_files(dataset.path))


def remove_leftovers(dataset: LatentDataset) -> None:
    """Remove the files of an abandoned attempt to add images to a finished data set."""
    remove_strays(dataset.path, (), dataset)
    storage.remove_folder(storage.join(dataset.path, RECORDS))


def shard_files(folder: str) -> list[str]:
    """Return the names of all files that look like shards, whether or not the data set lists them."""
    return [name for name in storage.list_files(folder) if fnmatch(name, "part-*.parquet")]
