"""Tables of text with aligned columns."""

from collections.abc import Sequence

from raydit.printable import one_line


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a text table whose columns are two spaces apart."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
