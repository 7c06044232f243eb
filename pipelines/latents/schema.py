"""The format of latent shards: columns, types and metadata of the Parquet files that hold moments.

Readable without raydit: `np.frombuffer(row["moments"], "<f2").reshape(manifest["moments_shape"])`, which is (2C, H, W):
mean and log variance; or (C, H, W), the latents themselves, if the manifest says "posterior": "deterministic".

A data set without moments ("store": false) has shards of the images that training encodes instead: `image_digest`, the
BLAKE2b-128 of the cropped image's uint8 (H, W, 3), and `location`, two little-endian int64 by which its source finds
it, or (-1, -1) where it is found by its key alone.
"""

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dit.autoencoders.kinds import DETERMINISTIC
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
IMAGE_DIGEST, LOCATION = "image_digest", "location"
"""Names of the columns."""
MOMENTS_DTYPE = "<f2"
"""float16, little-endian: precise enough for moments, whose range is checked before the cast."""
DIGEST_BYTES, LOCATION_DTYPE = 16, "<i8"
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
    """Scale of latents (`dit.autoencoders.latent_scale`); None for classes whose record of the autoencoder holds it."""
    encoding: Mapping[str, Any] | None = None
    """Settings of [encode] with which training encodes the images, if no moments are stored; None if they are."""

    @property
    def row_bytes(self) -> int:
        """Bytes that a shard holds of each image, besides its key and label."""
        if self.encoding is not None:
            return DIGEST_BYTES + 2 * np.dtype(LOCATION_DTYPE).itemsize
        return moments_bytes(self.moments_shape, self.flip)

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
            **({} if self.encoding is None else {"store": False, "encoding": dict(self.encoding)}),
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
            encoding=_recorded_encoding(record),
        )


def _known_posterior(recorded: Any) -> Literal["deterministic"] | None:
    if recorded not in (None, DETERMINISTIC):
        raise ValueError(f"posterior is {recorded!r}")
    return None if recorded is None else DETERMINISTIC


def _recorded_encoding(record: Mapping[str, Any]) -> dict[str, Any] | None:
    if (store := record.get("store", True)) not in (True, False):
        raise ValueError(f"store is {store!r}")
    return None if store else dict(record["encoding"])


def moments_bytes(shape: Sequence[int], flip: bool) -> int:
    """Return the bytes of one image's moments, and those of its horizontal flip if `flip`. shape: of the moments."""
    return math.prod(shape) * np.dtype(MOMENTS_DTYPE).itemsize * (1 + flip)


def latent_schema(description: LatentDescription) -> "pa.Schema":
    """Return the Arrow schema of a shard, with its description as metadata."""
    import pyarrow as pa

    fields = [(KEY, pa.string()), (LABEL, pa.int32())]
    if description.encoding is not None:
        location = pa.binary(2 * np.dtype(LOCATION_DTYPE).itemsize)
        fields += [(IMAGE_DIGEST, pa.binary(DIGEST_BYTES)), (LOCATION, location)]
    else:
        moments = pa.binary(moments_bytes(description.moments_shape, False))
        fields += [(MOMENTS, moments), *([(MOMENTS_FLIP, moments)] if description.flip else [])]
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

    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int32())]
    for name, values in ((MOMENTS, moments), (MOMENTS_FLIP, moments_flip)):
        if values is not None:
            columns.append(_binary_column(values, MOMENTS_DTYPE, schema.field(name).type))
    return pa.table(columns, schema=schema)


def image_table(
    schema: "pa.Schema", keys: Sequence[str], labels: np.ndarray, digests: np.ndarray, locations: np.ndarray | None
) -> "pa.Table":
    """Return the table of one shard without moments.

    labels: int32 (N,). digests: uint8 (N, DIGEST_BYTES). locations: int64 (N, 2), or None if the source has none.
    """
    import pyarrow as pa

    if locations is None:
        locations = np.full((len(keys), 2), -1)
    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int32())]
    columns.append(_binary_column(digests, "u1", schema.field(IMAGE_DIGEST).type))
    columns.append(_binary_column(locations, LOCATION_DTYPE, schema.field(LOCATION).type))
    return pa.table(columns, schema=schema)


def _binary_column(values: np.ndarray, dtype: str, type: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    data = np.ascontiguousarray(values, dtype=dtype)
    return pa.FixedSizeBinaryArray.from_buffers(type, len(data), [None, pa.py_buffer(data)])


def parquet_bytes(table: "pa.Table") -> bytes:
    """Return a table as a Parquet file, without compression and dictionaries, which only slow down random bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


def check_claims(metadata: "pq.FileMetaData", rows: int, num_bytes: int, where: str) -> None:
    """Raise InvalidInput if a shard has another number of rows, or needs more memory than it has bytes.

    Shards are not compressed, so that a row that is read has its bytes in the file. The footer's claims about
    individual columns are not checked, because pyarrow crashes on some malformed ones.
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

    from pipelines.images.claimed_sizes import decoded_bytes

    if KEY not in table.column_names or not pa.types.is_dictionary((keys := table.column(KEY)).type):
        return table
    if (length := decoded_bytes(keys)) > num_bytes:
        raise InvalidInput(
            f"{where}: found keys of {length:,} bytes in {num_bytes:,}", "each key in full", "copy the file again"
        )
    return table.set_column(table.column_names.index(KEY), KEY, keys.cast(pa.string()))


def moments_array(column: "pa.ChunkedArray", shape: Sequence[int]) -> np.ndarray:
    """Return a column of moments as float16 (N, *shape), without a copy if it has one chunk. shape: theirs."""
    return binary_array(column, MOMENTS_DTYPE, shape)


def binary_array(column: "pa.ChunkedArray", dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Return a column of fixed_size_binary as an array (N, *shape), without a copy if it has one chunk."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, *shape)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    if not chunks:
        return np.zeros((0, *shape), dtype)
    return np.concatenate(chunks) if len(chunks) != 1 else chunks[0]
