"""Read CSV and JSON Lines files with any common separator, in UTF-8, or in UTF-16 if a byte order mark says so."""

import codecs
import csv
import re
from collections.abc import Callable, Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.labels import is_text
from raydit.errors import InvalidInput

DELIMITERS = (",", ";", "\t", "|")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Encodings by the mark at the start of a file."""
MAX_DEPTH = 64
"""Deepest nesting of values in JSON Lines."""
MAX_EMPTY_CELLS, CELLS_PER_BYTE = 2**25, 8
"""Cells that a table of JSON Lines may have, and further ones for each byte: a cell with a value takes some bytes."""
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b'"[]{}')


def read_text_table(
    data: bytes,
    names: Collection[str],
    labels: Collection[str],
    delimiter: str,
    where: str,
    read_labels: Callable[[pa.ChunkedArray], pa.ChunkedArray] | None = None,
) -> pa.Table:
    """Read a CSV file with a line of column names.

    names: columns of which one is expected, and which stay text; they tell the separator. labels: columns that are
    used as well. delimiter: the separator if names do not tell another. where: the file, for messages. read_labels:
    returns numbers for the text of labels that pyarrow takes for no text, or the text; None to take pyarrow's values.
    Raises InvalidInput if the encoding of a column that is used is not known, and pyarrow.ArrowInvalid if lines differ
    in their columns.
    """
    import pyarrow.csv

    unknown: InvalidInput | None = None
    try:
        data = as_utf8(data, where)
    except InvalidInput as error:
        unknown = error
    try:
        header = next(csv.reader([_first_line(data).decode()], delimiter=delimiter), [])
        if not set(names) & set(header):
            delimiter = _find_delimiter(_first_line(data).decode(), names) or delimiter
        # Without quotes, no cell has line breaks, and pyarrow finds the ends of its blocks faster.
        parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=b'"' in data)

        def read(texts: Collection[str], only: Sequence[str] = ()) -> pa.Table:
            types = dict.fromkeys(texts, pa.string())
            converting = pyarrow.csv.ConvertOptions(column_types=types, include_columns=only)
            return pyarrow.csv.read_csv(pa.BufferReader(data), parse_options=parsing, convert_options=converting)

        table = read(names)
        if read_labels is not None and (converted := _find_converted(table.schema, labels)):
            texts = read(converted, only=converted)
            for name in converted:
                column = _read_as_written(texts.column(name), table.column(name), read_labels)
                table = table.set_column(table.schema.get_field_index(name), name, column)
    except (UnicodeDecodeError, pa.ArrowInvalid):
        if unknown is not None:
            raise unknown from None
        raise
    # A column that is not UTF-8 is read as bytes; other columns than those of names and labels may be anything.
    if unknown is not None and any(pa.types.is_binary(field.type) for field in table.schema if field.name in labels):
        raise unknown
    return table


def _find_converted(schema: pa.Schema, labels: Collection[str]) -> list[str]:
    """Return the columns of labels that pyarrow takes for numbers, dates or truth values, if their names are unique."""
    single = (field for field in schema if schema.names.count(field.name) == 1 and field.name in labels)
    return [field.name for field in single if not is_text(field.type) and not pa.types.is_binary(field.type)]


def _read_as_written(
    texts: pa.ChunkedArray, values: pa.ChunkedArray, read_labels: Callable[[pa.ChunkedArray], pa.ChunkedArray]
) -> pa.ChunkedArray:
    """Return labels as numbers or as the file spells them, with null where they are missing.

    texts: the labels as text. values: the labels as pyarrow converts them, which are returned if some are fractions.
    """
    if pa.types.is_floating(values.type) and pc.any(pc.not_equal(values, pc.floor(values))).as_py():
        return values
    texts = pc.if_else(pc.is_valid(values), pc.utf8_trim_whitespace(texts), None)
    # Tools write the whole numbers of a column with gaps as 3.0.
    numbers = read_labels(pc.replace_substring_regex(texts, r"\.0+$", ""))
    return texts if is_text(numbers.type) else numbers


def _first_line(data: bytes) -> bytes:
    start = re.compile(rb"[\r\n]*").match(data)
    line = re.compile(rb"[^\r\n]*").match(data, start.end() if start else 0)
    return line[0] if line else b""


def read_json_lines(data: bytes, texts: Collection[str], where: str) -> pa.Table:
    """Read a JSON Lines file. Raises InvalidInput if values are nested too deeply or most cells empty, or ArrowInvalid.

    texts: columns in which dates stay text. pyarrow takes time with the square of the depth, crashes the process at a
    depth of 100,000, and makes a column for every field that occurs.
    """
    import pyarrow.json

    if is_deeper(data, MAX_DEPTH):
        raise InvalidInput(
            f"images.path: {where}: found values nested more than {MAX_DEPTH} deep, or brackets that are not closed",
            "an object with a file's name and label in every line",
            "correct the table",
        )
    num_cells = _count_fields(data) * data.count(b"{")
    if num_cells > MAX_EMPTY_CELLS + CELLS_PER_BYTE * len(data):
        raise InvalidInput(
            f"images.path: {where}: found up to {num_cells:,} cells in {len(data):,} bytes",
            "the same fields in every line",
            "correct the table",
        )
    table = pyarrow.json.read_json(pa.BufferReader(data))
    dates = [field.name for field in table.schema if field.name in texts and pa.types.is_timestamp(field.type)]
    if not dates:
        return table
    parsing = pyarrow.json.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in dates]))
    return pyarrow.json.read_json(pa.BufferReader(data), parse_options=parsing)


def _count_fields(data: bytes) -> int:
    """Return the number of different names of fields in JSON, or a little more."""
    if any(space in data for space in (b" :", b"\t:", b"\r:", b"\n:")):
        data = re.sub(rb'"\s+:', b'":', data)
    return len({part[part.rfind(b'"') :] for part in data.split(b'":')})


def is_deeper(data: bytes, depth: int) -> bool:
    """Return whether brackets in JSON are nested more than `depth` deep, or do not match."""
    if b"\\" in data:
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = data.translate(None, _NO_BRACKETS).replace(b'""', b"")  # what is in quotes stays so without two of them
    if b'"' in brackets:
        brackets = re.sub(rb'"[^"]*"', b"", brackets)
    for _ in range(depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return bool(brackets)


def _find_delimiter(header: str, names: Collection[str]) -> str | None:
    """Return the separator by which a line of column names has one of those that are expected, or None."""
    found = (each for each in DELIMITERS if set(names) & set(next(csv.reader([header], delimiter=each), [])))
    return next(found, None)


def as_utf8(data: bytes, where: str) -> bytes:
    """Return a text file's content in UTF-8 without a mark. Raises InvalidInput if its encoding is not known."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:2]:
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding or "utf-8").encode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidInput(
            f"images.path: {where}: found bytes in line {line:,} that are not {(encoding or 'utf-8').upper()}",
            "a table in UTF-8, because other encodings cannot be told apart",
            "save it as UTF-8, such as by `iconv -f latin1 -t utf-8` if it is in Latin-1",
        ) from None
