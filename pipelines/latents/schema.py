"""The latent table: columns, types and metadata of the Parquet files that hold moments.

Readable without raydit: `np.frombuffer(row["moments"], "<f2").reshape(2 * C, H, W)`.
"""

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "raydit.latents"
VERSION = 1
METADATA_KEY = b"raydit"
KEY, LABEL, MOMENTS, MOMENTS_FLIP = "key", "label", "moments", "moments_flip"
MOMENTS_DTYPE = "<f2"
"""float16, little-endian: enough for moments, whose range is checked before the cast."""


def latent_schema(description: dict) -> "pa.Schema":
    """Arrow schema of one shard; `description` (see `describe`) becomes its metadata."""
    import pyarrow as pa

    moments = pa.binary(int(np.prod(description["moments_shape"])) * np.dtype(MOMENTS_DTYPE).itemsize)
    fields = [(KEY, pa.string()), (LABEL, pa.int32()), (MOMENTS, moments)]
    if description["flip"]:
        fields.append((MOMENTS_FLIP, moments))
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(description, sort_keys=True)})


def describe(*, moments_shape: tuple, flip: bool, autoencoder: dict, preprocessing: dict, class_names) -> dict:
    """What every shard and the manifest say of themselves."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "moments_shape": list(moments_shape),
        "moments_dtype": MOMENTS_DTYPE,
        "flip": flip,
        "autoencoder": autoencoder,
        "preprocessing": preprocessing,
        "class_names": list(class_names),
    }


def shard_table(schema: "pa.Schema", keys, labels, moments: np.ndarray, flipped: np.ndarray | None) -> "pa.Table":
    """One shard: moments and flipped are float16 (N, 2C, H, W)."""
    import pyarrow as pa

    width = schema.field(MOMENTS).type.byte_width
    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int32()), _binary(moments, width)]
    if flipped is not None:
        columns.append(_binary(flipped, width))
    return pa.table(columns, schema=schema)


def _binary(moments: np.ndarray, width: int) -> "pa.Array":
    import pyarrow as pa

    data = np.ascontiguousarray(moments, dtype=MOMENTS_DTYPE)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data)])


def parquet_bytes(table: "pa.Table") -> bytes:
    """The table as a Parquet file: no compression and no dictionary, which random bytes only slow down."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


def moments_array(column: "pa.ChunkedArray", shape: tuple[int, ...]) -> np.ndarray:
    """A moments column -> float16 (N, 2C, H, W), without a copy where it is one chunk."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], MOMENTS_DTYPE).reshape(-1, *shape)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    if not chunks:
        return np.zeros((0, *shape), MOMENTS_DTYPE)
    return np.concatenate(chunks) if len(chunks) != 1 else chunks[0]
