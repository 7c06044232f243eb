"""Latent data sets: a folder of Parquet shards, on disk or at a URI, that a manifest declares complete."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import storage
from pipelines.latents import schema
from pipelines.latents.quarantine import QUARANTINE, read_quarantine, write_quarantine
from pipelines.latents.records import QuarantinedImage, ShardEntry, ShardRecord, require_count
from pipelines.latents.schema import LatentDescription
from pipelines.latents.shard_tables import read_shard_table
from pipelines.latents.statistics import ChannelSums, channel_statistics, sums_from_statistics
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LatentDataset:
    """A finished latent data set. Properties read its manifest; methods read its shards."""

    path: str
    """Absolute path or URI of the folder."""
    manifest: dict[str, Any]
    """Content of manifest.json."""

    @classmethod
    def open(cls, path: str | Path) -> "LatentDataset":
        """Open a data set by path or URI.

        Raises NotFound if it does not exist or is not finished, InvalidInput if it has another format.
        """
        path = storage.absolute(str(path))
        file = storage.join(path, MANIFEST)
        if not storage.exists(file):
            state = "is not finished (no manifest.json)" if storage.exists(path) else "does not exist"
            raise NotFound(
                f"the latent data set {path} {state}", "a finished one", "run `raydit encode` with its recipe"
            )
        manifest = storage.read_json_object(file)
        if manifest.get("format") != schema.FORMAT or manifest.get("version") != schema.VERSION:
            raise InvalidInput(
                f"{file}: found format {manifest.get('format')!r} version {manifest.get('version')!r}",
                f"{schema.FORMAT!r} version {schema.VERSION}",
                "use the raydit that wrote it, or encode the images again",
            )
        dataset = cls(path, manifest)
        try:
            dataset._check_manifest()
        except InvalidInput:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"{file}: found no manifest ({type(error).__name__}: {str(error)[:200]})",
                "what `raydit encode` wrote",
                "copy it again, or delete it and run `raydit encode`",
            ) from error
        return dataset

    def _check_manifest(self) -> None:
        """Raise InvalidInput, KeyError or TypeError for a manifest whose claims cannot be true."""
        require_count(self.manifest["quarantined"])
        require_count(self.manifest["rows"])
        if not re.fullmatch(r"[0-9a-f]{64}", str(self.manifest["fingerprint"])):
            raise InvalidInput(
                f"{self.path}/{MANIFEST}: found fingerprint {str(self.manifest['fingerprint'])[:100]!r}",
                "64 hexadecimal digits",
                "copy it again, or encode the images again",
            )
        row_bytes = self.description.row_bytes
        for shard in self.shards:
            if shard.rows * row_bytes > shard.bytes:
                raise InvalidInput(
                    f"{self.path}/{MANIFEST}: found {shard.rows:,} rows in {shard.file} of {shard.bytes:,} bytes",
                    f"{row_bytes:,} bytes for each row",
                    "copy it again, or encode the images again",
                )

    def __len__(self) -> int:
        """Number of images that were encoded."""
        return self.manifest["rows"]

    @property
    def fingerprint(self) -> str:
        """Digest of the content, which trainings and evaluations record; see `fingerprint_of`."""
        return self.manifest["fingerprint"]

    @property
    def revision(self) -> int:
        """1, plus one each time that images were added."""
        return self.manifest.get("revision", 1)

    @cached_property
    def description(self) -> LatentDescription:
        """What every shard repeats."""
        return LatentDescription.from_json(self.manifest)

    @cached_property
    def shards(self) -> tuple[ShardEntry, ...]:
        """All shards in order."""
        return tuple(map(ShardEntry.from_json, self.manifest["shards"]))

    @property
    def num_quarantined(self) -> int:
        """Number of images that could not be used."""
        return self.manifest["quarantined"]

    @property
    def identity(self) -> dict[str, Any]:
        """What the latents depend on; see `pipelines.latents.identity.encode_identity`."""
        return self.manifest["identity"]

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe by which the images were encoded; empty if it is not known."""
        return self.manifest["recipe"]

    @property
    def autoencoder(self) -> dict[str, Any]:
        """The autoencoder's record: id, class, sha256 of the weights, shape and scale."""
        about_moments = {name: self.manifest[name] for name in schema.MOMENTS_FIELDS if name in self.manifest}
        return {**self.manifest["autoencoder"], **about_moments}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Size and crop of the images."""
        return self.manifest["preprocessing"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers; empty if there are no classes."""
        return tuple(self.manifest["class_names"])

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C, H, W) of the moments, or (C, H, W) if their posterior is deterministic."""
        return self.description.moments_shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        return self.description.latent_shape

    @property
    def is_deterministic(self) -> bool:
        """Whether the moments are the latents themselves, without a log variance."""
        return self.description.posterior is not None

    @property
    def stores_moments(self) -> bool:
        """Whether the shards hold moments; if not, training reads and encodes the images that they name."""
        return self.description.encoding is None

    @property
    def has_flip(self) -> bool:
        """Whether training uses the moments of horizontally flipped images too."""
        return self.manifest["flip"]

    @property
    def statistics(self) -> dict[str, list[float]]:
        """Per-channel mean and standard deviation of unscaled latents: "latents_mean" and "latents_std", (C,) each."""
        return {name: self.manifest[name] for name in ("latents_mean", "latents_std")}

    @property
    def channel_sums(self) -> ChannelSums:
        """Per-channel sums over all rows, up to rounding, from the recorded statistics."""
        count = len(self) * int(np.prod(self.latent_shape[1:]))
        return sums_from_statistics(self.manifest["latents_mean"], self.manifest["latents_std"], count)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards on storage."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def array_bytes(self) -> int:
        """Bytes of all moments as arrays in memory."""
        return len(self) * int(np.prod(self.moments_shape)) * 2 * (1 + self.has_flip)

    @cached_property
    def arrays(self) -> "LatentArrays":
        """The entire data set in memory. Raises InvalidInput if a shard does not match the manifest."""
        return LatentArrays.from_tables(list(self.tables()), self.moments_shape)

    def shard_arrays(self, number: int) -> "LatentArrays":
        """Load one shard into memory. Raises InvalidInput if it does not match the manifest."""
        return LatentArrays.from_tables([self.read_shard(self.shards[number])], self.moments_shape)

    def tables(self, columns: list[str] | None = None) -> Iterator["pa.Table"]:
        """Yield the shards in order as Arrow tables. Raises InvalidInput if one is missing or truncated."""
        return (self.read_shard(shard, columns) for shard in self.shards)

    def read_shard(self, shard: ShardEntry, columns: list[str] | None = None) -> "pa.Table":
        """Return a shard as an Arrow table: memory-mapped from disk, or read from an object store.

        Raises InvalidInput if the file is missing, has another length, or claims more than its bytes can hold.
        """
        file = self._check_file(shard)
        (filesystem, inner), is_local = storage.resolve(file), storage.is_local(file)

        def read() -> "pa.Table":
            opening = {"filesystem": filesystem, "memory_map": is_local}
            return read_shard_table(inner, shard, file, columns=columns, is_local=is_local, **opening)

        return read() if is_local else storage.retry_throttled(read)

    def _check_file(self, shard: ShardEntry) -> str:
        file = storage.join(self.path, shard.file)
        try:
            size = storage.file_size(file)
        except FileNotFoundError:
            found = "nothing"
        else:
            if size == shard.bytes:
                return file
            found = f"{size} bytes"
        raise InvalidInput(
            f"{file}: found {found}",
            f"{shard.bytes} bytes according to the manifest",
            f"copy the file again, or delete {storage.join(self.path, MANIFEST)} and run `raydit encode`, which makes "
            "it again",
        )

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the keys of the images at some positions (int64 (n,))."""
        starts = np.cumsum([0] + [shard.rows for shard in self.shards])
        keys = []
        for row, number in zip(rows, np.searchsorted(starts, rows, side="right") - 1, strict=True):
            table = self.read_shard(self.shards[number], [schema.KEY])
            keys.append(table.column(schema.KEY)[int(row - starts[number])].as_py())
        return keys

    def read_quarantine(self) -> list[QuarantinedImage]:
        """Return the images that could not be used, without those of an `encode` that has not finished."""
        return read_quarantine(storage.join(self.path, QUARANTINE))[: self.num_quarantined]


@dataclass(frozen=True)
class LatentArrays:
    """Labels and moments of N images as arrays, in row order."""

    labels: np.ndarray
    """int64 (N,)."""
    moments: np.ndarray
    """float16 (N, *moments_shape)."""
    moments_flip: np.ndarray | None
    """Moments of the horizontally flipped images, float16 (N, *moments_shape); None if they are not stored."""

    @classmethod
    def from_tables(cls, tables: Sequence["pa.Table"], moments_shape: Sequence[int]) -> "LatentArrays":
        """Copy the columns of some tables of a data set. moments_shape: of each row's moments."""
        import pyarrow as pa

        table = pa.concat_tables(tables)
        flip = schema.MOMENTS_FLIP in table.column_names
        return cls(
            labels=table.column(schema.LABEL).to_numpy().astype(np.int64),
            moments=schema.moments_array(table.column(schema.MOMENTS), moments_shape),
            moments_flip=schema.moments_array(table.column(schema.MOMENTS_FLIP), moments_shape) if flip else None,
        )

    def copy_moments(self, rows: np.ndarray, flip: np.ndarray, out: np.ndarray) -> None:
        """Copy the moments of some rows, which must exist, into `out`, float16 (n, *moments_shape).

        flip: bool (n,): where to take the moments of the flipped image, if they are stored.
        """
        # By numbers of rows: assigning by a mask holds the interpreter. "clip", because "raise" copies once more.
        np.take(self.moments, rows, axis=0, out=out, mode="clip")
        if self.moments_flip is not None:
            flipped = np.flatnonzero(flip)
            out[flipped] = self.moments_flip[rows[flipped]]


def write_manifest(
    path: str,
    description: LatentDescription,
    identity: dict[str, Any],
    records: Sequence[ShardRecord],
    *,
    recipe: dict[str, Any],
    earlier: LatentDataset | None = None,
    further_digests: Mapping[str, str] | None = None,
) -> LatentDataset:
    """Finish a data set: write the quarantine first, the manifest last.

    records: those of the new shards, in order. earlier: the data set in the same folder to which they are added; its
    manifest stays valid until the new one replaces it. further_digests: the autoencoder's.
    """
    quarantined = [image for record in records for image in record.quarantined]
    shards = [record.entry for record in records]
    sums, revision = [record.channels for record in records], 1
    if earlier is not None:
        quarantined, shards = [*earlier.read_quarantine(), *quarantined], [*earlier.shards, *shards]
        sums, revision = [earlier.channel_sums, *sums], earlier.revision + 1
    write_quarantine(storage.join(path, QUARANTINE), quarantined)
    manifest = {
        **description.to_json(),
        "revision": revision,
        "shards": [asdict(shard) for shard in shards],
        "rows": sum(shard.rows for shard in shards),
        "quarantined": len(quarantined),
        **channel_statistics(sums),
        "identity": identity,
        "fingerprint": fingerprint_of(description, shards),
        "recipe": recipe,
    }
    if further_digests is not None:
        manifest["autoencoder"] = {**description.autoencoder, **further_digests}
    storage.write_json_atomically(storage.join(path, MANIFEST), manifest)
    return LatentDataset(path, manifest)


def fingerprint_of(description: LatentDescription, shards: Sequence[ShardEntry]) -> str:
    """Return the sha256 that identifies a data set's content: its description, and the digest of every shard."""
    # The autoencoder's digest is content; its id is only where it was loaded from.
    autoencoder = {name: value for name, value in description.autoencoder.items() if name != "id"}
    content = [{**description.to_json(), "autoencoder": autoencoder}, [shard.sha256 for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
