"""Latent data sets: a folder of Parquet shards and the manifest that makes it whole."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cluster import storage
from pipelines import schema

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"


@dataclass(frozen=True)
class LatentDataset:
    """A finished latent data set."""

    path: Path
    manifest: dict

    @classmethod
    def open(cls, path: str | Path) -> "LatentDataset":
        """Raises FileNotFoundError if it is not finished, ValueError if it is not ours."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            state = "is not finished (no manifest.json)" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"latent data set {path} {state}; run `raydit encode` with its recipe")
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("format") != schema.FORMAT or manifest.get("version") != schema.VERSION:
            raise ValueError(
                f"{path / MANIFEST}: found format {manifest.get('format')!r} version {manifest.get('version')!r}, "
                f"expected {schema.FORMAT!r} version {schema.VERSION}"
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["class_names"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents, half the channels of the moments."""
        channels, height, width = self.manifest["moments_shape"]
        return channels // 2, height, width

    @cached_property
    def arrays(self) -> "LatentArrays":
        """The whole data set in memory."""
        return LatentArrays.read(self)


@dataclass(frozen=True)
class LatentArrays:
    """Labels and moments of a data set as arrays, in row order."""

    labels: np.ndarray
    """int64 (N,)."""
    moments: np.ndarray
    """float16 (N, 2C, H, W)."""
    moments_flip: np.ndarray | None

    @classmethod
    def read(cls, dataset: LatentDataset) -> "LatentArrays":
        """Read every shard. Raises ValueError if one does not match the manifest."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for shard in dataset.manifest["shards"]:
            file = dataset.path / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
                raise ValueError(
                    f"{file}: found {found}, expected {shard['bytes']} bytes as the manifest says. Copy the file "
                    f"again, or delete {dataset.path / MANIFEST} and run `raydit encode`, which makes it anew"
                )
            tables.append(pq.read_table(file, memory_map=True))
        table = pa.concat_tables(tables)
        shape = tuple(dataset.manifest["moments_shape"])
        flip = schema.MOMENTS_FLIP in table.column_names
        return cls(
            labels=table.column(schema.LABEL).to_numpy().astype(np.int64),
            moments=schema.moments_array(table.column(schema.MOMENTS), shape),
            moments_flip=schema.moments_array(table.column(schema.MOMENTS_FLIP), shape) if flip else None,
        )


def write_manifest(path: Path, description: dict, identity: dict, records: list[dict]) -> LatentDataset:
    """Finish a data set: quarantine first, manifest last. `records` are those of its shards, in order."""
    quarantined = [entry for record in records for entry in record["quarantined"]]
    _write_quarantine(path / QUARANTINE, quarantined)
    shards = [{name: record[name] for name in ("file", "rows", "bytes", "sha256")} for record in records]
    manifest = {
        **description,
        "shards": shards,
        "rows": sum(shard["rows"] for shard in shards),
        "quarantined": len(quarantined),
        **_channel_statistics(records),
        "identity": identity,
        "fingerprint": _fingerprint(description, shards),
    }
    storage.write_json_atomically(str(path / MANIFEST), manifest)
    return LatentDataset(path, manifest)


def _write_quarantine(path: Path, entries: list[dict]) -> None:
    import pyarrow as pa

    columns = {name: pa.array([entry[name] for entry in entries], pa.string()) for name in ("key", "error")}
    storage.write_atomically(str(path), schema.shard_bytes(pa.table(columns)))


def _fingerprint(description: dict, shards: list[dict]) -> str:
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


def _channel_statistics(records: list[dict]) -> dict[str, list[float]]:
    """Mean and standard deviation of unscaled latents drawn from the posteriors, per channel."""
    sums = [record["channels"] for record in records if record["channels"]["count"]]
    if not sums:
        return {"latents_mean": [], "latents_std": []}
    count = sum(entry["count"] for entry in sums)
    mean = np.sum([entry["sum"] for entry in sums], axis=0) / count
    square = np.sum([entry["sum_squares"] for entry in sums], axis=0) / count
    return {"latents_mean": mean.tolist(), "latents_std": np.sqrt(square - mean**2).tolist()}
