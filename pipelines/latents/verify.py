"""`raydit latents verify`: check that a latent data set is what its manifest says."""

import hashlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import storage
from cluster.doctor import Check
from pipelines.latents import schema
from pipelines.latents.dataset import MANIFEST, LatentDataset, fingerprint_of
from pipelines.latents.records import ShardEntry
from pipelines.latents.samples import (
    decode_moments,
    encode_images,
    evenly_spaced,
    load_autoencoder,
    read_images,
    read_rows,
    source_of,
    to_tensor,
)
from pipelines.latents.shard_tables import read_shard_table
from pipelines.latents.shards import shard_files
from pipelines.latents.source_images import SourceImages, find_locations
from pipelines.latents.statistics import ChannelSums, channel_statistics, channel_sums
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    import pyarrow as pa

MAX_DISTANCE = 0.1
"""Largest `relative_distance` between stored moments and those encoded now; bfloat16 is below, a wrong image above."""
COPY_AGAIN = f"copy it again, or delete {MANIFEST} and run `raydit encode`, which makes it again"
ENCODE_AGAIN = f"another program wrote it: delete {MANIFEST} and run `raydit encode`"
CONCURRENT_READS = 4
SCALE_FIELDS = ("latents_mean", "latents_std")
"""Fields of an autoencoder's record that hold its scale; that of some classes is in the description's "scale"."""
TOPICS = ("digests", "schema", "keys", "ranges", "counts", "statistics", "fingerprint")


@dataclass
class Findings:
    """What was wrong, and what the shards hold; filled while they are read one after the other."""

    wrong: list[Check] = field(default_factory=list)
    num_read: int = 0
    """Number of shards whose rows could be checked."""
    keys: set[str] = field(default_factory=set)
    """Keys of all rows so far."""
    sums: list[ChannelSums] = field(default_factory=list)
    """Channel sums of each shard so far."""

    def add(self, topic: str, found: str, do: str = ENCODE_AGAIN) -> None:
        """Record something wrong under one of TOPICS."""
        self.wrong.append(Check(topic, False, found, do))


def verify(dataset: LatentDataset, *, sample: int = 64) -> Iterator[Check]:
    """Compare a data set with its manifest and with itself. Yields a check for each topic, or for each thing wrong.

    Reads every byte. sample: number of rows whose moments are encoded again, if autoencoder and images are available.
    """
    findings = Findings()
    for shard in dataset.shards:
        if (table := check_file(dataset, shard, findings)) is not None:
            check_rows(dataset, shard, table, findings)
    check_strays(dataset, findings)
    check_counts(dataset, findings)
    check_statistics(dataset, findings)
    if (expected := fingerprint_of(dataset.description, dataset.shards)) != dataset.fingerprint:
        findings.add("fingerprint", f"found {dataset.fingerprint[:12]}, the content's is {expected[:12]}")
    for topic in TOPICS:
        wrong = [check for check in findings.wrong if check.name == topic]
        yield from wrong or [Check(topic, True, _summarize(topic, dataset, findings))]
    yield check_images(dataset, sample)


def check_digests(dataset: LatentDataset, count: int | None = None) -> None:
    """Compare the digests of some shards with the manifest. Raises InvalidInput, naming the first that differs.

    count: how many shards, chosen at random at each call; None for all of them.
    """
    shards = dataset.shards
    chosen = shards if count is None else random.SystemRandom().sample(shards, min(count, len(shards)))
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        digests = pool.map(lambda shard: storage.sha256_file(storage.join(dataset.path, shard.file)), chosen)
        for shard, digest in zip(chosen, digests, strict=True):
            _require_digest(dataset, shard, digest)


def read_verified_shard(dataset: LatentDataset, shard: ShardEntry) -> "pa.Table":
    """Return a shard as an Arrow table of bytes that have the manifest's digest.

    The bytes of the file are held in memory. Raises InvalidInput if they have another digest, and NotFound.
    """
    import pyarrow as pa

    file = storage.join(dataset.path, shard.file)
    data = storage.read_bytes(file)
    _require_digest(dataset, shard, hashlib.sha256(data).hexdigest())
    return read_shard_table(pa.BufferReader(data), shard, file)


def _require_digest(dataset: LatentDataset, shard: ShardEntry, digest: str) -> None:
    """Raise InvalidInput, naming the file, unless the digest of a shard's file is the manifest's."""
    if digest != shard.sha256:
        raise InvalidInput(
            f"{storage.join(dataset.path, shard.file)}: found sha256 {digest[:12]}",
            f"{shard.sha256[:12]} according to the manifest",
            COPY_AGAIN,
        )


def check_file(dataset: LatentDataset, shard: ShardEntry, findings: Findings) -> "pa.Table | None":
    """Return the table of a shard, or None unless the file has the manifest's digest, the right columns and no more
    rows and bytes than the manifest lists.
    """
    import pyarrow as pa

    file = storage.join(dataset.path, shard.file)
    try:
        data = storage.read_bytes(file)
    except FileNotFoundError:
        findings.add("digests", f"{shard.file} is missing", COPY_AGAIN)
        return None
    found = f"{len(data):,} bytes with sha256 {(digest := hashlib.sha256(data).hexdigest())[:12]}"
    if digest != shard.sha256 or len(data) != shard.bytes:
        expected = f"{shard.bytes:,} with {shard.sha256[:12]}"
        findings.add("digests", f"{shard.file}: found {found}, expected {expected}", COPY_AGAIN)
        return None
    try:
        table = read_shard_table(pa.BufferReader(data), shard, file)
    except InvalidInput as error:
        findings.add("schema", error.problem, error.do)
        return None
    columns = schema.latent_schema(dataset.description)
    if not table.schema.equals(columns):
        found, expected = (", ".join(f"{f.name} {f.type}" for f in each) for each in (table.schema, columns))
        findings.add("schema", f"{shard.file}: found {found}; expected {expected}")
        return None
    if _description_in(table.schema) != _description_in(columns):
        findings.add("schema", f"{shard.file}: its description differs from the manifest's")
    return table


def check_rows(dataset: LatentDataset, shard: ShardEntry, table: "pa.Table", findings: Findings) -> None:
    """Check the number of rows, the keys, labels and moments of one shard."""
    findings.num_read += 1
    if table.num_rows != shard.rows:
        findings.add("counts", f"{shard.file}: found {table.num_rows} rows, expected {shard.rows}")
    for key in table.column(schema.KEY).to_pylist():
        if key in findings.keys:
            findings.add("keys", f"{shard.file}: {key!r} already has a row")
        findings.keys.add(key)
    labels, classes = table.column(schema.LABEL).to_numpy(), max(1, len(dataset.class_names))
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        span = f"labels from {labels.min()} to {labels.max()}"
        findings.add("ranges", f"{shard.file}: {span}, expected 0 to {classes - 1}")
    for name in table.column_names:
        if name not in (schema.MOMENTS, schema.MOMENTS_FLIP):
            continue
        moments = schema.moments_array(table.column(name), dataset.moments_shape)
        if bad := int((~np.isfinite(moments).all(axis=(1, 2, 3))).sum()):
            findings.add("ranges", f"{shard.file}: {bad} rows of {name} hold infinity or NaN")
        if name == schema.MOMENTS:
            findings.sums.append(channel_sums(moments, deterministic=dataset.is_deterministic))


def check_strays(dataset: LatentDataset, findings: Findings) -> None:
    """Find files that look like shards but are not listed; other tools would read them as `part-*.parquet`."""
    listed = {shard.file for shard in dataset.shards}
    for stray in sorted(set(shard_files(dataset.path)) - listed):
        findings.add("digests", f"{stray} is not in the manifest", "run `raydit encode` to finish, or remove it")


def check_counts(dataset: LatentDataset, findings: Findings) -> None:
    """Check that rows + quarantined = images found, and that no image is in both."""
    found = dataset.identity["images"]["count"]
    rows = sum(shard.rows for shard in dataset.shards)
    try:
        quarantined = dataset.read_quarantine()
    except (OSError, ValueError) as error:
        return findings.add("counts", f"quarantine.parquet cannot be read: {error}", COPY_AGAIN)
    if rows != len(dataset) or len(quarantined) != dataset.num_quarantined:
        findings.add(
            "counts",
            f"found {rows} rows and {len(quarantined)} quarantined, the manifest says {len(dataset)} and "
            f"{dataset.num_quarantined}",
        )
    if rows + len(quarantined) != found:
        findings.add("counts", f"{rows} rows and {len(quarantined)} quarantined, but {found} images were found")
    for image in quarantined:
        if image.key in findings.keys:
            findings.add("counts", f"{image.key} has a row and is quarantined")


def check_statistics(dataset: LatentDataset, findings: Findings) -> None:
    """Compare the recorded mean and standard deviation of the channels with those of the rows."""
    if findings.num_read < len(dataset.shards) or not dataset.stores_moments:
        return
    for name, values in channel_statistics(findings.sums).items():
        recorded = dataset.statistics[name]
        if not np.allclose(values, recorded, rtol=1e-6, atol=1e-9):
            findings.add("statistics", f"{name}: found {recorded}, the rows have {values}")


def check_images(dataset: LatentDataset, count: int) -> Check:
    """Compare a sample of rows with their images: decode the rows, and encode the images again."""
    if not dataset.stores_moments:
        return check_source(dataset, count)
    try:
        rows = read_rows(dataset, evenly_spaced(len(dataset), count))
        autoencoder, images = load_autoencoder(dataset, download=False), read_images(dataset, rows.keys)
    except (ValueError, OSError) as error:
        return Check("images", True, f"not compared: {str(error).splitlines()[0]}")
    from dit.autoencoder import psnr

    assert rows.moments is not None, "the data set stores moments"
    decibel = psnr(to_tensor(images), to_tensor(decode_moments(autoencoder, rows.moments)))
    pairs = [(rows.moments, images)]
    if rows.moments_flip is not None:
        pairs.append((rows.moments_flip, images[:, :, ::-1]))
    channels = dataset.latent_shape[0]
    distances = [
        relative_distance(stored[:, :channels], encode_images(autoencoder, given)[:, :channels])
        for stored, given in pairs
    ]
    found = f"{len(images)} rows decode to {decibel:.1f} dB; moments encoded now differ by {max(distances):.2%}"
    agree = max(distances) <= MAX_DISTANCE
    return Check("images", agree, found, "" if agree else ENCODE_AGAIN)


def check_source(dataset: LatentDataset, count: int) -> Check:
    """Compare a sample of images with those that were encoded, where training reads them again."""
    try:
        source = source_of(dataset)
        images = SourceImages(dataset, source, find_locations(dataset, source)).read(evenly_spaced(len(dataset), count))
    except (InvalidInput, NotFound) as error:
        return Check("images", False, error.found, error.do)
    except OSError as error:
        return Check("images", True, f"not compared: {str(error).splitlines()[0]}")
    return Check("images", True, f"{len(images)} images are those that were encoded")


def relative_distance(stored: np.ndarray, fresh: np.ndarray) -> float:
    """Return the root mean square difference of posterior means over their standard deviation.

    stored, fresh: posterior means (N, C, H, W).
    """
    means, expected = (values.astype(np.float64) for values in (stored, fresh))
    return float(np.sqrt(np.mean((means - expected) ** 2)) / max(expected.std(), 1e-12))


def _summarize(topic: str, dataset: LatentDataset, findings: Findings) -> str:
    """Return the line for a topic with nothing wrong."""
    shards, shape = len(dataset.shards), dataset.moments_shape
    partly = f" in {findings.num_read} of {shards} shards" if findings.num_read < shards else ""
    finite, statistics = ", moments finite", "mean and standard deviation match the rows"
    if partly:
        statistics = "not compared: rows are missing"
    elif not dataset.stores_moments:
        finite, statistics = "", "not compared: no moments are stored"
    return {
        "digests": f"{shards} shards, {dataset.num_bytes / 2**20:.1f} MiB, as the manifest says",
        "schema": f"format version {schema.VERSION}, moments {shape}{partly}",
        "keys": f"{len(findings.keys):,}, all different{partly}",
        "ranges": f"labels below {max(1, len(dataset.class_names))}{finite}{partly}",
        "counts": f"{len(dataset):,} rows + {dataset.num_quarantined} quarantined = images found",
        "statistics": statistics,
        "fingerprint": dataset.fingerprint[:12],
    }[topic]


def _description_in(arrow_schema: "pa.Schema") -> dict[str, Any]:
    """Return the description in a shard's metadata, without the id by which its autoencoder was loaded, and its scale.

    The moments do not depend on these, and they may have changed before further shards were added.
    """
    description = json.loads(arrow_schema.metadata.get(schema.METADATA_KEY, b"{}"))
    about_moments = description.get("autoencoder", {}).items()
    autoencoder = {name: value for name, value in about_moments if name not in ("id", *SCALE_FIELDS)}
    return {name: value for name, value in description.items() if name != "scale"} | {"autoencoder": autoencoder}
