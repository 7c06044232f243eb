"""The table of a latent shard, whose size is checked against the file's length before any memory is allocated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.images.claimed_sizes import explain_broken
from pipelines.latents import schema
from pipelines.latents.records import ShardEntry

if TYPE_CHECKING:
    import pyarrow as pa


def read_shard_table(
    source: Any,
    shard: ShardEntry,
    file: str,
    *,
    columns: Sequence[str] | None = None,
    is_local: bool = True,
    **opening: Any,
) -> "pa.Table":
    """Return the table of a shard, or some columns of it.

    source: what pyarrow reads, which has as many bytes as the manifest lists. file: the shard's path or URI, for
    messages. is_local: errors of reading a file in an object store are raised as they are. opening: further arguments
    of pyarrow's ParquetFile. Raises InvalidInput for a broken file, and for one that claims more rows than the manifest
    lists, or more memory than its bytes can hold.
    """
    import pyarrow.parquet as pq

    with (
        explain_broken(file, "shard", "what `raydit encode` wrote", is_local, field=""),
        pq.ParquetFile(source, read_dictionary=[schema.KEY], **opening) as opened,
    ):
        schema.check_claims(opened.metadata, shard.rows, shard.bytes, file)
        return schema.with_plain_keys(opened.read(columns=columns), shard.bytes, file)
