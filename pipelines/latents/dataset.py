"""Latent data sets: a folder of Parquet shards, on disk or at a URI, and the manifest that makes it whole."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from pipelines.latents import schema
from pipelines.latents.quarantine import QUARANTINE, write_quarantine

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LatentDataset:
    """A finished latent data set."""

    path: str
    """Absolute path or URI."""
    manifest: dict

    @classmethod
    def open(cls, path: str | Path) -> "LatentDataset":
        """Raises FileNotFoundError if it is not finished, ValueError if it is not ours."""
        path = storage.absolute(str(path))
        file = storage.join(path, MANIFEST)
        if not storage.exists(file):
            state = "is not finished (no manifest.json)" if storage.exists(path) else "does not exist"
            raise FileNotFoundError(f"latent data set {path} {state}; run `raydit encode` with its recipe")
        manifest = storage.read_json(file)
        if manifest.get("format") != schema.FORMAT or manifest.get("version") != schema.VERSION:
            raise ValueError(
                f"{file}: found format {manifest.get('format')!r} version {manifest.get('version')!r}, "
                f"expected {schema.FORMAT!r} version {schema.VERSION}"
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def revision(self) -> int:
        """1, and one more each time that images were added."""
        return self.manifest.get("revision", 1)

    def channel_sums(self) -> dict:
        """What `channel_sums` gives for all of its rows, to within rounding: from the recorded statistics."""
        mean, std = (np.array(self.manifest[name]) for name in ("latents_mean", "latents_std"))
        count = len(self) * int(np.prod(self.latent_shape[1:]))
        return {"sum": mean * count, "sum_squares": (std**2 + mean**2) * count, "count": count}

    @property
    def num_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.manifest["shards"])

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["class_names"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents, half the channels of the moments."""
        channels, height, width = self.manifest["moments_shape"]
        return channels // 2, height, width

    @property
    def has_flip(self) -> bool:
        """Whether the moments of mirrored images are there."""
        return self.manifest["flip"]

    @property
    def array_bytes(self) -> int:
        """Bytes of all moments as arrays."""
        return len(self) * int(np.prod(self.manifest["moments_shape"])) * 2 * (1 + self.has_flip)

    @cached_property
    def arrays(self) -> "LatentArrays":
        """The whole data set in memory. Raises ValueError if a shard does not match the manifest."""
        return LatentArrays.of(self.manifest, list(self.tables()))

    def shard_arrays(self, number: int) -> "LatentArrays":
        """One shard in memory. Raises ValueError if it does not match the manifest."""
        return LatentArrays.of(self.manifest, [self.shard_table(self.manifest["shards"][number])])

    def tables(self, columns: list[str] | None = None) -> Iterator["pa.Table"]:
        """The shards, in order, as Arrow tables. Raises ValueError if one is gone or cut."""
        return (self.shard_table(shard, columns) for shard in self.manifest["shards"])

    def shard_table(self, shard: dict, columns: list[str] | None = None) -> "pa.Table":
        """A shard by its entry in the manifest, as an Arrow table: mapped from disk, or read from an object store."""
        import pyarrow.parquet as pq

        file = self._checked(shard)
        if storage.is_local(file):
            return pq.read_table(file, columns=columns, memory_map=True)
        filesystem, inner = storage.resolve(file)
        return storage.retry_throttled(lambda: pq.read_table(inner, columns=columns, filesystem=filesystem))

    def _checked(self, shard: dict) -> str:
        file = storage.join(self.path, shard["file"])
        try:
            size = storage.file_size(file)
        except FileNotFoundError:
            found = "nothing"
        else:
            if size == shard["bytes"]:
                return file
            found = f"{size} bytes"
        raise ValueError(
            f"{file}: found {found}, expected {shard['bytes']} bytes as the manifest says. Copy the file "
            f"again, or delete {storage.join(self.path, MANIFEST)} and run `raydit encode`, which makes it anew"
        )

    def keys(self, rows: np.ndarray) -> list[str]:
        """Keys of the images of some rows."""
        starts = np.cumsum([0] + [shard["rows"] for shard in self.manifest["shards"]])
        keys = []
        for row, number in zip(rows, np.searchsorted(starts, rows, side="right") - 1, strict=True):
            table = self.shard_table(self.manifest["shards"][number], [schema.KEY])
            keys.append(table.column(schema.KEY)[int(row - starts[number])].as_py())
        return keys

    def quarantined(self) -> list[dict]:
        """Key and error of every image that could not be used.

        The file may hold more than the manifest counts: images added by an `encode` that has not finished.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = storage.read_bytes(storage.join(self.path, QUARANTINE))
        return pq.read_table(pa.BufferReader(data)).slice(0, self.manifest["quarantined"]).to_pylist()


@dataclass(frozen=True)
class LatentArrays:
    """Labels and moments of a data set as arrays, in row order."""

    labels: np.ndarray
    """int64 (N,)."""
    moments: np.ndarray
    """float16 (N, 2C, H, W)."""
    moments_flip: np.ndarray | None

    @classmethod
    def of(cls, manifest: dict, tables: list["pa.Table"]) -> "LatentArrays":
        """Copy the columns of some of a data set's tables."""
        import pyarrow as pa

        table = pa.concat_tables(tables)
        shape = tuple(manifest["moments_shape"])
        flip = schema.MOMENTS_FLIP in table.column_names
        return cls(
            labels=table.column(schema.LABEL).to_numpy().astype(np.int64),
            moments=schema.moments_array(table.column(schema.MOMENTS), shape),
            moments_flip=schema.moments_array(table.column(schema.MOMENTS_FLIP), shape) if flip else None,
        )

    def select_moments(self, rows: np.ndarray, flip: np.ndarray) -> np.ndarray:
        """Return a copy of the moments of rows (n,); where flip (n,), bool, those of the flipped image, if encoded."""
        moments = self.moments[rows]
        if self.moments_flip is not None:
            moments[flip] = self.moments_flip[rows[flip]]
        return moments


def write_manifest(
    path: str,
    description: dict,
    identity: dict,
    records: list[dict],
    *,
    recipe: dict,
    earlier: LatentDataset | None = None,
) -> LatentDataset:
    """Finish a data set: quarantine first, manifest last. `records` are those of its shards, in order.

    earlier: the data set in the same place that these shards are added to; its manifest is valid until the end.
    """
    quarantined = [entry for record in records for entry in record["quarantined"]]
    shards = [{name: record[name] for name in ("file", "rows", "bytes", "sha256")} for record in records]
    sums, revision = [record["channels"] for record in records], 1
    if earlier is not None:
        quarantined, shards = earlier.quarantined() + quarantined, earlier.manifest["shards"] + shards
        sums, revision = [earlier.channel_sums(), *sums], earlier.revision + 1
    write_quarantine(storage.join(path, QUARANTINE), quarantined)
    manifest = {
        **description,
        "revision": revision,
        "shards": shards,
        "rows": sum(shard["rows"] for shard in shards),
        "quarantined": len(quarantined),
        **channel_statistics(sums),
        "identity": identity,
        "fingerprint": fingerprint_of(description, shards),
        "recipe": recipe,
    }
    storage.write_json_atomically(storage.join(path, MANIFEST), manifest)
    return LatentDataset(path, manifest)


def fingerprint_of(description: dict, shards: list[dict]) -> str:
    """Identity of a data set's content: what it says of itself, and the digest of every shard."""
    # Where the autoencoder was loaded from is not content; what it is (its digest) is.
    autoencoder = {name: value for name, value in description["autoencoder"].items() if name != "id"}
    content = [{**description, "autoencoder": autoencoder}, [shard["sha256"] for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def channel_sums(moments: np.ndarray) -> dict[str, list[float]]:
    """Per channel, sums over a shard from which mean and variance of posterior draws follow. float64."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
    variance = np.exp(np.clip(log_variance, -30.0, 20.0))
    axes = (0, 2, 3)
    return {
        "sum": mean.sum(axes).tolist(),
        "sum_squares": (mean**2 + variance).sum(axes).tolist(),
        "count": int(moments.shape[0] * np.prod(moments.shape[2:])),
    }


def channel_statistics(sums: list[dict]) -> dict[str, list[float]]:
    """Mean and standard deviation of unscaled latents drawn from the posteriors, per channel, from `channel_sums`."""
    sums = [entry for entry in sums if entry["count"]]
    if not sums:
        return {"latents_mean": [], "latents_std": []}
    count = sum(entry["count"] for entry in sums)
    mean = np.sum([entry["sum"] for entry in sums], axis=0) / count
    square = np.sum([entry["sum_squares"] for entry in sums], axis=0) / count
    return {"latents_mean": mean.tolist(), "latents_std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}
