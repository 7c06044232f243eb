"""The format of latent shards: columns, types and metadata of the Parquet files that hold moments.

Readable without raydit: `np.frombuffer(row["moments"], "<f2").reshape(manifest["moments_shape"])`, which is (2C, H, W):
mean and log variance; or (C, H, W), the latents themselves, if the manifest says "posterior": "deterministic".
"""

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dit.autoencoder_kinds import DETERMINISTIC
from dit.formats.record import FURTHER_DIGESTS
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = "raydit.latents"
VERSION = 1
METADATA_KEY = b"raydit"
"""Key of the Parquet metadata under which every shard holds its `LatentDescription` as JSON."""
KEY, LABEL, MOMENTS, MOMENTS_FLIP = "key", "label", "moments", "moments_flip"
"""Names of the columns."""
MOMENTS_DTYPE = "<f2"
"""float16, little-endian: precise enough for moments, whose range is checked before the cast."""
MOMENTS_FIELDS = ("posterior", "scale")
"""Fields of an autoencoder's record that the description holds by themselves, because they are about the moments."""


@dataclass(frozen=True, kw_only=True)
class LatentDescription:
    """What every shard and the manifest record about the latents."""

    moments_shape: tuple[int, int, int]
    """(2C, H, W), or (C, H, W) if the posterior is deterministic."""
    flip: bool
    """Whether the moments of horizontally flipped images are stored too."""
    autoencoder: dict[str, Any]
    """`AutoencoderHandle.describe` of the autoencoder that encoded the images."""
    preprocessing: dict[str, Any]
    """Size and crop of the images."""
    class_names: tuple[str, ...]
    moments_dtype: str = MOMENTS_DTYPE
    posterior: Literal["deterministic"] | None = None
    """Whether moments are the latents themselves, without a log variance; None where they have one."""
    scale: Mapping[str, Any] | None = None
    """Scale of latents (`dit.latent_scale`); None for classes whose record of the autoencoder holds it."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        channels, height, width = self.moments_shape
        return channels if self.posterior else channels // 2, height, width

    def to_json(self) -> dict[str, Any]:
        """Return the description as shards and manifest hold it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "moments_shape": list(self.moments_shape),
            "moments_dtype": self.moments_dtype,
            "flip": self.flip,
            "autoencoder": self.autoencoder,
            "preprocessing": self.preprocessing,
            "class_names": list(self.class_names),
            **{name: value for name in MOMENTS_FIELDS if (value := getattr(self, name)) is not None},
        }

    def shard_json(self) -> dict[str, Any]:
        """Return the description as shards hold it: without a scale for each position, which is megabytes of text."""
        content = self.to_json()
        if self.scale is not None and np.ndim(self.scale.get("mean", ())) > 1:
            del content["scale"]
        return content

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "LatentDescription":
        """Read the description from a manifest, or from the metadata of a shard.

        Raises KeyError, TypeError or ValueError for what is no description.
        """
        channels, height, width = map(operator.index, record["moments_shape"])
        if min(channels, height, width) < 1:
            raise ValueError(f"moments_shape is {channels, height, width}")
        return cls(
            moments_shape=(channels, height, width),
            moments_dtype=record["moments_dtype"],
            flip=record["flip"],
            # Only the manifest has it: shards and fingerprints are what they were before it was recorded.
            autoencoder={name: value for name, value in record["autoencoder"].items() if name not in FURTHER_DIGESTS},
            preprocessing=record["preprocessing"],
            class_names=tuple(record["class_names"]),
            posterior=_known_posterior(record.get("posterior")),
            scale=record.get("scale"),
        )


def _known_posterior(recorded: Any) -> Literal["deterministic"] | None:
    if recorded not in (None, DETERMINISTIC):
        raise ValueError(f"posterior is {recorded!r}")
    return None if recorded is None else DETERMINISTIC


def moments_bytes(shape: Sequence[int], flip: bool) -> int:
    """Return the bytes of one image's moments, and those of its horizontal flip if `flip`. shape: of the moments."""
    return math.prod(shape) * np.dtype(MOMENTS_DTYPE).itemsize * (1 + flip)


def latent_schema(description: LatentDescription) -> "pa.Schema":
    """Return the Arrow schema of a shard, with its description as metadata."""
    import pyarrow as pa

    moments = pa.binary(moments_bytes(description.moments_shape, False))
    fields = [(KEY, pa.string()), (LABEL, pa.int32()), (MOMENTS, moments)]
    if description.flip:
        fields.append((MOMENTS_FLIP, moments))
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(description.shard_json(), sort_keys=True)})


def shard_table(
    schema: "pa.Schema",
    keys: Sequence[str],
    labels: np.ndarray,
    moments: np.ndarray,
    moments_flip: np.ndarray | None,
) -> "pa.Table":
    """Return the table of one shard. labels: int32 (N,). moments, moments_flip: float16 (N, *moments_shape)."""
    import pyarrow as pa

    width = schema.field(MOMENTS).type.byte_width
    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int32()), _binary_column(moments, width)]
    if moments_flip is not None:
        columns.append(_binary_column(moments_flip, width))
    return pa.table(columns, schema=schema)


def _binary_column(moments: np.ndarray, width: int) -> "pa.Array":
    import pyarrow as pa

    data = np.ascontiguousarray(moments, dtype=MOMENTS_DTYPE)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data)])


def parquet_bytes(table: "pa.Table") -> bytes:
    """Return a table as a Parquet file, without compression and dictionaries, which only slow down random bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


def check_claims(metadata: "pq.FileMetaData", rows: int, num_bytes: int, where: str) -> None:
    """Raise InvalidInput if a shard has another number of rows, or needs more memory than it has bytes.

    Shards are not compressed, so that a row that is read has its bytes in the file. What the footer says of single
    columns is not looked at: for some broken ones pyarrow ends the process.
    """
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    if metadata.num_rows != rows or not 0 <= size <= num_bytes:
        raise InvalidInput(
            f"{where}: found {metadata.num_rows:,} rows of {size:,} bytes",
            f"{rows:,} in {num_bytes:,}, according to the manifest",
            "copy the file again, or encode the images again",
        )


def with_plain_keys(table: "pa.Table", num_bytes: int, where: str) -> "pa.Table":
    """Return a table with its keys as text, which were read as a dictionary: a file may hold equal texts once.

    num_bytes: of the shard. Raises InvalidInput if all keys together are longer.
    """
    import pyarrow as pa

    from pipelines.images.claims import decoded_bytes

    if KEY not in table.column_names or not pa.types.is_dictionary((keys := table.column(KEY)).type):
        return table
    if (length := decoded_bytes(keys)) > num_bytes:
        raise InvalidInput(
            f"{where}: found keys of {length:,} bytes in {num_bytes:,}", "each key in full", "copy the file again"
        )
    return table.set_column(table.column_names.index(KEY), KEY, keys.cast(pa.string()))


def moments_array(column: "pa.ChunkedArray", shape: Sequence[int]) -> np.ndarray:
    """Return a column of moments as float16 (N, *shape), without a copy if it has one chunk. shape: theirs."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], MOMENTS_DTYPE).reshape(-1, *shape)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    if not chunks:
        return np.zeros((0, *shape), MOMENTS_DTYPE)
    return np.concatenate(chunks) if len(chunks) != 1 else chunks[0]
