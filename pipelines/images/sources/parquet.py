"""Encoded images in a column of Parquet files, in the layout of Hugging Face data sets."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images.claimed_sizes import check_parquet, check_rows, explain_broken, read_text
from pipelines.images.decoding import is_image
from pipelines.images.listing import Locations, make_stamp
from pipelines.images.source_files import ImagesPath
from pipelines.images.sources.columns import ColumnSource, FileListing, decode_cell, split_key
from raydit.lfs import refuse_lfs_pointer

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

SUFFIX = ".parquet"
MAX_BYTES_AT_ONCE = 2**28
"""Bytes that the rows decoded at a time take at most, even if each is as long as the entire row group."""
MIN_ROWS_AT_ONCE, MAX_ROWS_AT_ONCE = 4, 4096
"""Fewer rows at a time take longer."""


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a Parquet file, or a folder with some and no images; tables are recognised first."""
    if path.name is not None:
        return path.name.endswith(SUFFIX)
    return any(name.endswith(SUFFIX) for name in path.names) and not any(map(is_image, path.names))


def open_parquet(path: ImagesPath, config: "ImagesConfig") -> "ParquetSource":
    """Open a Parquet file, or all those in a folder that belong to the wanted split."""
    return ParquetSource(path.files, config, [path.name] if path.name else None, undivided=path.name)


class ParquetSource(ColumnSource):
    """Rows of Parquet files. A row group is read once for consecutive keys of it."""

    def _list_file(self, name: str) -> FileListing:
        with self._explain(name), self.files.open(name) as file:
            parquet, where = self._open(file, name), self.files.path(name)
            schema, num_bytes = parquet.schema_arrow, file.size()
            image, label = self._image_column(schema, name), self._label_column(schema, name)
            check_parquet(parquet, num_bytes, where)
            check_rows(parquet.metadata.num_rows, num_bytes, where)
            labels = read_text(parquet, file, label, where) if label else None
            # The stamp is of all columns: which one is read must show in it where another would be read by default.
            column = "" if self._overridden_column(schema) is None else image
            stamps = np.full(parquet.metadata.num_rows, _stamp(file, column), np.int64)
            columns = tuple(column for column in schema.names if column != image)
            ambiguous = "" if column or image == self._usual_column(schema) else self._chosen_column(schema)
            class_names = self._class_names(schema, label)
            return FileListing(labels, stamps, class_names, columns=columns, image_column=ambiguous)

    def _open(self, file: pa.NativeFile, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file)
        except pa.ArrowInvalid:
            refuse_lfs_pointer(
                file.read_at(min(file.size(), 100), 0), f"images.path: {self.files.path(name)}", "Parquet"
            )
            raise

    def _explain(self, name: str) -> AbstractContextManager[None]:
        return explain_broken(self.files.path(name), "Parquet", "complete Parquet files", self.files.is_local)

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        for name, group in groupby(map(split_key, keys), key=lambda pair: pair[0]):
            with self.files.open(name) as file:
                with self._explain(name):
                    parquet = self._open(file, name)
                yield from map(decode_cell, self._cells(parquet, name, [row for _, row in group]))

    def _cells(self, parquet: pq.ParquetFile, name: str, rows: list[int]) -> Iterator[pa.Scalar]:
        schema = parquet.schema_arrow
        image = self._image_column(schema, name)
        wanted = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
        counts = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *counts])
        for group, run in groupby(rows, key=lambda row: int(np.searchsorted(starts, row, side="right")) - 1):
            inside = [row - int(starts[group]) for row in run]
            ascending = sorted(inside)
            cells = self._read_ascending(parquet, name, group, wanted, ascending)
            if inside == ascending:
                yield from cells
            else:
                found = dict(zip(ascending, cells, strict=True))
                yield from map(found.__getitem__, inside)

    def _read_ascending(
        self, parquet: pq.ParquetFile, name: str, group: int, column: str, rows: list[int]
    ) -> Iterator[pa.Scalar]:
        """Yield the cells of a column at some rows of a row group, given in ascending order.

        A row group is decoded a few rows at a time: equal images may be in a file only once, and fill the memory when
        all of them are decoded.
        """
        num_bytes = parquet.metadata.row_group(group).total_byte_size
        rows_at_once = min(MAX_ROWS_AT_ONCE, max(MIN_ROWS_AT_ONCE, MAX_BYTES_AT_ONCE // max(1, num_bytes)))
        batches = parquet.iter_batches(rows_at_once, row_groups=[group], columns=[column], use_threads=False)
        start, data = 0, pa.array([])
        for row in rows:
            while row >= start + len(data):
                start, data = start + len(data), pa.array([])  # frees the rows before the next are decoded
                with self._explain(name):
                    data = next((batch.column(0) for batch in batches), data)
                    if not len(data):
                        raise EOFError(f"its row group {group} ends at row {start:,}")
            yield data[row - start]


def _stamp(file: pa.NativeFile, column: str = "") -> int:
    """Hash a file's length and footer, which holds the schema and the length of every chunk of every column.

    column: name to be hashed as well.
    """
    size = file.size()
    footer = int.from_bytes(file.read_at(4, size - 8), "little")
    return make_stamp(size.to_bytes(8, "little"), file.read_at(footer, size - 8 - footer), column.encode())
