"""What files claim about their content, checked against the file's length before any memory is allocated."""

import errno
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.images.labels import class_label_columns, decode_texts, is_text
from raydit.errors import InvalidInput, NotFound, RayditError
from raydit.printable import message_of

FREE_ROWS = 1_000_000
"""Rows that a file may have however short it is: empty ones take no bytes, and equal ones hardly any."""
FREE_BYTES = 2**28
"""Bytes that a column may decode to, however short the file is."""
NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
"""Errors of the system that say that there is no such file, and not that the disk fails."""
MAX_EXPANSION = 1000
"""Most bytes of a column for each byte of its file, beyond FREE_BYTES."""


def check_rows(num_rows: int, file_bytes: int, where: str, rows_per_byte: float = 1 / 8) -> None:
    """Raise InvalidInput if a file has more rows than images, or names of images, fit into its length.

    Each row becomes a key in memory. rows_per_byte: of the file, beyond FREE_ROWS; no image is shorter than 8 bytes.
    """
    if not 0 <= num_rows <= max(FREE_ROWS, file_bytes * rows_per_byte):
        raise InvalidInput(
            f"images.path: {where}: found {num_rows:,} rows in {file_bytes:,} bytes",
            f"at most {int(max(FREE_ROWS, file_bytes * rows_per_byte)):,} rows with images in them",
            "write the file again",
        )


@contextmanager
def explain_broken(
    where: str, kind: str, expected: str, is_local: bool, field: str = "images.path: "
) -> Iterator[None]:
    """Replace what pyarrow raises for a broken file with InvalidInput. where: the file. kind: what it should be.

    is_local: errors of reading a file in an object store pass, because the file may be intact. field: of the recipe,
    with which the message begins.
    """
    try:
        yield
    except RayditError:
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, KeyError) as error:  # KeyError: a missing column
        number = getattr(error, "errno", None)
        if number in NO_SUCH_FILE:
            found = f"{field}{where} cannot be opened ({os.strerror(number)})"
            raise NotFound(found, expected, "copy it again") from error
        if isinstance(error, OSError) and (number or not is_local):
            raise
        reason = message_of(error)[:300]
        found = f"{field}{where}: found no readable {kind} ({reason})"
        raise InvalidInput(found, expected, "copy it again") from error


def check_parquet(parquet: pq.ParquetFile, file_bytes: int, where: str) -> None:
    """Raise InvalidInput if the footer of a Parquet file claims numbers that differ, or too many bytes.

    The footer's claims about individual columns are not checked, because pyarrow crashes on some malformed ones.
    """
    metadata = parquet.metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_rows = sum(_refuse_negative(group.num_rows, where) for group in groups)
    num_bytes = sum(_refuse_negative(group.total_byte_size, where) for group in groups)
    if num_rows != metadata.num_rows:
        raise InvalidInput(
            f"images.path: {where}: found {metadata.num_rows:,} rows, and {num_rows:,} in its row groups",
            "the same number",
            "write the file again",
        )
    if num_bytes > FREE_BYTES + MAX_EXPANSION * file_bytes:
        raise InvalidInput(
            f"images.path: {where}: found {num_bytes:,} bytes in {file_bytes:,}",
            f"at most {MAX_EXPANSION:,} times the length of the file",
            "write the file again",
        )


def _refuse_negative(number: int, where: str) -> int:
    if number < 0:
        raise InvalidInput(f"images.path: {where}: found {number:,} rows or bytes", "0 or more", "write the file again")
    return number


def read_text(parquet: pq.ParquetFile, source: pa.NativeFile, column: str, where: str) -> pa.ChunkedArray:
    """Read a column of labels or names, whose equal texts a file may hold once, however long they are.

    parquet: the file that is read from `source`. Raises InvalidInput if the texts of all rows together are longer than
    FREE_BYTES, and than the file.
    """
    kind = parquet.schema_arrow.field(column).type
    if not is_text(kind) and not pa.types.is_binary(kind):
        return parquet.read(columns=[column]).column(column)
    encoded = pq.ParquetFile(source, metadata=parquet.metadata, read_dictionary=[column])
    texts = encoded.read(columns=[column]).column(column)
    if not pa.types.is_dictionary(texts.type):
        return texts
    for chunk in texts.chunks:
        chunk.dictionary.validate(full=True)  # pyarrow reads texts that are not UTF-8, and fails later
    num_bytes, file_bytes = decoded_bytes(texts), source.size()
    if num_bytes > max(FREE_BYTES, file_bytes):
        raise InvalidInput(
            f"images.path: {where}, column {column}: found texts of {num_bytes:,} bytes in {file_bytes:,} bytes",
            "class names or names of files",
            "choose another column by images.label_column or images.image_column",
        )
    if pa.types.is_dictionary(kind):
        return texts
    return decode_texts(texts) if pa.types.is_string_view(kind) else texts.cast(kind)


def read_parquet_columns(content: bytes, wanted: Collection[str], where: str) -> pa.Table:
    """Read some columns of a Parquet table, and those that are declared as class labels; others become null.

    wanted: names of columns, which need not exist. Columns that share a name become null as well. Raises InvalidInput
    for claims that the table's length does not allow, and what pyarrow raises for a broken file.
    """
    source = pa.BufferReader(content)
    parquet = pq.ParquetFile(source)
    schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    single = {name for name, count in Counter(schema.names).items() if count == 1}
    read = {*wanted, *class_label_columns(schema.metadata)} & single
    check_parquet(parquet, len(content), where)
    check_rows(num_rows, len(content), where, rows_per_byte=16)  # sequences of names compress well
    nulls = pa.nulls(num_rows)
    columns = [read_text(parquet, source, name, where) if name in read else nulls for name in schema.names]
    return pa.table(columns, schema.names, metadata=schema.metadata)


def decoded_bytes(texts: pa.ChunkedArray) -> int:
    """Return the bytes that a dictionary-encoded column has when every row holds its text in full."""
    lengths = [pc.cast(pc.binary_length(chunk.dictionary), pa.int64()).take(chunk.indices) for chunk in texts.chunks]
    return sum(pc.sum(each).as_py() or 0 for each in lengths)
