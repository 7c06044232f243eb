"""Read CSV files as people have them: of any usual separator, in UTF-8 or, where a mark says so, UTF-16."""

import codecs
import csv
from collections.abc import Collection

import pyarrow as pa

from raydit.errors import InvalidInput

DELIMITERS = (",", ";", "\t", "|")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Encodings by the mark at the start of a file."""


def read_text_table(
    data: bytes, names: Collection[str], labels: Collection[str], delimiter: str, where: str
) -> pa.Table:
    """Read a CSV file with a line of column names.

    names: columns of which one is expected, and which stay text; they tell the separator. labels: columns that are
    used as well. delimiter: the separator if names do not tell another. where: the file, for messages. Raises
    InvalidInput if the encoding of a column that is used is not known, and pyarrow.ArrowInvalid if lines differ in
    their columns.
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
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (UnicodeDecodeError, pa.ArrowInvalid):
        if unknown is not None:
            raise unknown from None
        raise
    # A column that is not UTF-8 is read as bytes; other columns than those of names and labels may be anything.
    if unknown is not None and any(
        pa.types.is_binary(table.schema.field(name).type) for name in labels if name in table.column_names
    ):
        raise unknown
    return table


def _first_line(data: bytes) -> bytes:
    lines = data.lstrip(b"\r\n").splitlines()
    return lines[0] if lines else b""


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
