"""Is a latent data set what its manifest says: `raydit latents verify`."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from cluster.doctor import Check
from pipelines.latents import schema
from pipelines.latents.dataset import MANIFEST, LatentDataset, channel_statistics, channel_sums, fingerprint_of
from pipelines.latents.shards import shard_files
from pipelines.latents.show import decode, encode, load_autoencoder, read_images, read_rows, spaced, tensor

if TYPE_CHECKING:
    import pyarrow as pa

AGREE = 0.1
"""How far stored moments may be from those made now, over their deviation: bfloat16 stays below, a wrong image not."""
COPY_AGAIN = f"copy it again, or delete {MANIFEST} and run `raydit encode`, which makes it anew"
NOT_OURS = f"something else wrote it: delete {MANIFEST} and run `raydit encode`"
TOPICS = ("digests", "schema", "keys", "ranges", "counts", "statistics", "fingerprint")


@dataclass
class Findings:
    """What was wrong, by topic, and what the shards hold; filled while they are read one after the other."""

    wrong: list[Check] = field(default_factory=list)
    read: int = 0
    """Shards whose rows could be looked at."""
    keys: set[str] = field(default_factory=set)
    sums: list[dict] = field(default_factory=list)

    def add(self, topic: str, found: str, do: str = NOT_OURS) -> None:
        self.wrong.append(Check(topic, False, found, do))


def verify(dataset: LatentDataset, *, sample: int = 64) -> Iterator[Check]:
    """Compare a data set with its manifest and with itself: a line for each topic, or for each thing wrong with it.

    Reads every byte. sample: rows whose moments are made once more, where autoencoder and images are at hand.
    """
    findings, manifest = Findings(), dataset.manifest
    for shard in manifest["shards"]:
        if (table := read_whole(dataset, shard, findings)) is not None:
            look_at_rows(dataset, shard, table, findings)
    look_at_strays(dataset, findings)
    look_at_counts(dataset, findings)
    look_at_statistics(dataset, findings)
    if (expected := fingerprint_of(description_of(manifest), manifest["shards"])) != dataset.fingerprint:
        findings.add("fingerprint", f"found {dataset.fingerprint[:12]}, the content's is {expected[:12]}")
    for topic in TOPICS:
        wrong = [check for check in findings.wrong if check.name == topic]
        yield from wrong or [Check(topic, True, _all_well(topic, dataset, findings))]
    yield check_images(dataset, sample)


def read_whole(dataset: LatentDataset, shard: dict, findings: Findings) -> "pa.Table | None":
    """The table of a shard if the file is the one that the manifest names, and a latent table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = shard["file"]
    try:
        data = storage.read_bytes(storage.join(dataset.path, name))
    except FileNotFoundError:
        findings.add("digests", f"{name} is not there", COPY_AGAIN)
        return None
    found = f"{len(data):,} bytes with sha256 {(digest := hashlib.sha256(data).hexdigest())[:12]}"
    if digest != shard["sha256"]:
        expected = f"{shard['bytes']:,} with {shard['sha256'][:12]}"
        findings.add("digests", f"{name}: found {found}, expected {expected}", COPY_AGAIN)
        return None
    table = pq.read_table(pa.BufferReader(data))
    columns = schema.latent_schema(description_of(dataset.manifest))
    if not table.schema.equals(columns):
        found, expected = (", ".join(f"{f.name} {f.type}" for f in each) for each in (table.schema, columns))
        findings.add("schema", f"{name}: found {found}; expected {expected}")
        return None
    if content_of(table.schema) != content_of(columns):
        findings.add("schema", f"{name}: what it says of itself is not what the manifest says")
    return table


def look_at_rows(dataset: LatentDataset, shard: dict, table: "pa.Table", findings: Findings) -> None:
    """Number of rows, keys, labels and moments of one shard."""
    file, findings.read = shard["file"], findings.read + 1
    if table.num_rows != shard["rows"]:
        findings.add("counts", f"{file}: found {table.num_rows} rows, expected {shard['rows']}")
    for key in table.column(schema.KEY).to_pylist():
        if key in findings.keys:
            findings.add("keys", f"{file}: {key!r} has a row already")
        findings.keys.add(key)
    labels, classes = table.column(schema.LABEL).to_numpy(), max(1, len(dataset.class_names))
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        findings.add("ranges", f"{file}: labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    for name in table.column_names:
        if name not in (schema.MOMENTS, schema.MOMENTS_FLIP):
            continue
        moments = schema.moments_array(table.column(name), tuple(dataset.manifest["moments_shape"]))
        if bad := int((~np.isfinite(moments).all(axis=(1, 2, 3))).sum()):
            findings.add("ranges", f"{file}: {bad} rows of {name} hold infinity or NaN")
        if name == schema.MOMENTS:
            findings.sums.append(channel_sums(moments))


def look_at_strays(dataset: LatentDataset, findings: Findings) -> None:
    """Files that look like shards and are none: `part-*.parquet` in another tool would read them."""
    known = {shard["file"] for shard in dataset.manifest["shards"]}
    for stray in sorted(set(shard_files(dataset.path)) - known):
        findings.add("digests", f"{stray} is not in the manifest", "run `raydit encode`, which finishes, or remove it")


def look_at_counts(dataset: LatentDataset, findings: Findings) -> None:
    """rows + quarantined = images found, and no image is in both."""
    manifest, found = dataset.manifest, dataset.manifest["identity"]["images"]["count"]
    rows = sum(shard["rows"] for shard in manifest["shards"])
    try:
        quarantined = dataset.quarantined()
    except (OSError, ValueError) as error:
        return findings.add("counts", f"quarantine.parquet cannot be read: {error}", COPY_AGAIN)
    if rows != manifest["rows"] or len(quarantined) != manifest["quarantined"]:
        findings.add(
            "counts",
            f"found {rows} rows and {len(quarantined)} quarantined, the manifest says {manifest['rows']} and "
            f"{manifest['quarantined']}",
        )
    if rows + len(quarantined) != found:
        findings.add("counts", f"{rows} rows and {len(quarantined)} quarantined, but {found} images were found")
    for entry in quarantined:
        if entry["key"] in findings.keys:
            findings.add("counts", f"{entry['key']} has a row and is quarantined")


def look_at_statistics(dataset: LatentDataset, findings: Findings) -> None:
    """Mean and deviation of the channels, made once more from the rows."""
    if findings.read < len(dataset.manifest["shards"]):
        return
    for name, values in channel_statistics(findings.sums).items():
        if not np.allclose(values, dataset.manifest[name], rtol=1e-6, atol=1e-9):
            findings.add("statistics", f"{name}: found {dataset.manifest[name]}, the rows have {values}")


def _all_well(topic: str, dataset: LatentDataset, findings: Findings) -> str:
    """What is said of a topic with nothing wrong."""
    manifest, shards = dataset.manifest, len(dataset.manifest["shards"])
    looked = f" in {findings.read} of {shards} shards" if findings.read < shards else ""
    return {
        "digests": f"{shards} shards, {dataset.num_bytes / 2**20:.1f} MiB, each as the manifest says",
        "schema": f"format version {manifest['version']}, moments {tuple(manifest['moments_shape'])}{looked}",
        "keys": f"{len(findings.keys):,}, no two alike{looked}",
        "ranges": f"labels below {max(1, len(dataset.class_names))}, moments finite{looked}",
        "counts": f"{len(dataset):,} rows + {manifest['quarantined']} quarantined = images found",
        "statistics": "not compared: rows are missing" if looked else "mean and deviation are those of the rows",
        "fingerprint": dataset.fingerprint[:12],
    }[topic]


def description_of(manifest: dict) -> dict:
    """The part of a manifest that every shard repeats."""
    names = ("format", "version", "moments_shape", "moments_dtype", "flip")
    return {name: manifest[name] for name in (*names, "autoencoder", "preprocessing", "class_names")}


def content_of(arrow_schema) -> dict:
    """What a shard says of itself, but for where its autoencoder was loaded from."""
    description = json.loads(arrow_schema.metadata.get(schema.METADATA_KEY, b"{}"))
    autoencoder = {name: value for name, value in description.get("autoencoder", {}).items() if name != "id"}
    return {**description, "autoencoder": autoencoder}


def check_images(dataset: LatentDataset, count: int) -> Check:
    """Decode a sample of rows beside their images, and make the rows' moments once more."""
    try:
        rows = read_rows(dataset, spaced(len(dataset), count))
        autoencoder, images = load_autoencoder(dataset, download=False), read_images(dataset, rows.keys)
    except (ValueError, OSError) as error:
        return Check("images", True, f"not compared: {str(error).splitlines()[0]}")
    from dit.autoencoder import psnr

    decibel = psnr(tensor(images), tensor(decode(autoencoder, rows.moments)))
    distances = [distance(rows.moments, encode(autoencoder, images))]
    if rows.moments_flip is not None:
        distances.append(distance(rows.moments_flip, encode(autoencoder, images[:, :, ::-1])))
    found = f"{len(images)} rows decode to {decibel:.1f} dB; moments made now differ by {max(distances):.2%}"
    agree = max(distances) <= AGREE
    return Check("images", agree, found, "" if agree else NOT_OURS)


def distance(stored: np.ndarray, fresh: np.ndarray) -> float:
    """Root mean square of the difference of posterior means, over their deviation."""
    means, expected = (np.split(moments.astype(np.float64), 2, axis=1)[0] for moments in (stored, fresh))
    return float(np.sqrt(np.mean((means - expected) ** 2)) / max(expected.std(), 1e-12))
