"""Encoded images in a column of Parquet files, in the layout of Hugging Face data sets."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.images.listing import stamp_of
from pipelines.images.sources.columns import ColumnSource, Part, _place

if TYPE_CHECKING:
    from PIL import Image


class ParquetSource(ColumnSource):
    """Parquet files. A row is found by its row group, which is read once for the rows wanted of it in a row."""

    def _part(self, name: str) -> Part:
        with self.files.open(name) as file:
            parquet = self._open(file, name)
            _, label = self._columns(parquet.schema_arrow, name)
            labels = parquet.read(columns=[label]).column(label) if label else None
            stamps = np.full(parquet.metadata.num_rows, _parquet_stamp(file), np.int64)
            return Part(labels, stamps, self._class_names(parquet.schema_arrow, label))

    def _open(self, file: pa.NativeFile, name: str) -> Any:
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"images.path: {self.files.path(name)}: found what is not Parquet ({error}), expected whole Parquet "
                "files; copy it again"
            ) from error

    def read(
        self, keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
    ) -> Iterator["Image.Image | Exception"]:
        for name, group in groupby(map(_place, keys), key=lambda place: place[0]):
            with self.files.open(name) as file:
                parquet = self._open(file, name)
                yield from map(self._decode, self._cells(parquet, name, [row for _, row in group]))

    def _cells(self, parquet, name: str, rows: list[int]) -> Iterator[pa.Scalar]:
        schema = parquet.schema_arrow
        image, _ = self._columns(schema, name)
        wanted = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
        counts = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *counts])
        for group, run in groupby(rows, key=lambda row: int(np.searchsorted(starts, row, side="right")) - 1):
            column = parquet.read_row_group(group, columns=[wanted]).column(0)
            yield from (column[row - starts[group]] for row in run)


def _parquet_stamp(file: pa.NativeFile) -> int:
    """Stands for a file's length and footer: the schema, and the length of every chunk of every column."""
    size = file.size()
    footer = int.from_bytes(file.read_at(4, size - 8), "little")
    return stamp_of(size.to_bytes(8, "little"), file.read_at(footer, size - 8 - footer))
