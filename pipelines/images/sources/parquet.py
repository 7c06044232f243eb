"""Encoded images in a column of Parquet files, in the layout of Hugging Face data sets."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images.decoding import is_image
from pipelines.images.files import ImagesPath
from pipelines.images.listing import Locations, make_stamp
from pipelines.images.sources.columns import ColumnSource, FileListing, decode_cell, split_key
from raydit.errors import InvalidInput
from raydit.lfs import refuse_lfs_pointer

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

SUFFIX = ".parquet"


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a Parquet file, or a folder with some and no images; tables are recognised first."""
    if path.name is not None:
        return path.name.endswith(SUFFIX)
    return any(name.endswith(SUFFIX) for name in path.names) and not any(map(is_image, path.names))


def open_parquet(path: ImagesPath, config: "ImagesConfig") -> "ParquetSource":
    """Open a Parquet file, or all those in a folder that belong to the wanted split."""
    return ParquetSource(path.files, config, [path.name] if path.name else None)


class ParquetSource(ColumnSource):
    """Rows of Parquet files. A row group is read once for consecutive keys of it."""

    def _list_file(self, name: str) -> FileListing:
        with self.files.open(name) as file:
            parquet = self._open(file, name)
            schema = parquet.schema_arrow
            image, label = self._image_column(schema, name), self._label_column(schema, name)
            labels = parquet.read(columns=[label]).column(label) if label else None
            stamps = np.full(parquet.metadata.num_rows, _stamp(file), np.int64)
            columns = tuple(column for column in schema.names if column != image)
            return FileListing(labels, stamps, self._class_names(schema, label), columns=columns)

    def _open(self, file: pa.NativeFile, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            refuse_lfs_pointer(
                file.read_at(min(file.size(), 100), 0), f"images.path: {self.files.path(name)}", "Parquet"
            )
            raise InvalidInput(
                f"images.path: {self.files.path(name)}: found no readable Parquet ({error})",
                "complete Parquet files",
                "copy it again",
            ) from error

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        for name, group in groupby(map(split_key, keys), key=lambda pair: pair[0]):
            with self.files.open(name) as file:
                parquet = self._open(file, name)
                yield from map(decode_cell, self._cells(parquet, name, [row for _, row in group]))

    def _cells(self, parquet: pq.ParquetFile, name: str, rows: list[int]) -> Iterator[pa.Scalar]:
        schema = parquet.schema_arrow
        image = self._image_column(schema, name)
        wanted = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
        counts = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *counts])
        for group, run in groupby(rows, key=lambda row: int(np.searchsorted(starts, row, side="right")) - 1):
            column = parquet.read_row_group(group, columns=[wanted]).column(0)
            yield from (column[row - starts[group]] for row in run)


def _stamp(file: pa.NativeFile) -> int:
    """Hash a file's length and footer, which holds the schema and the length of every chunk of every column."""
    size = file.size()
    footer = int.from_bytes(file.read_at(4, size - 8), "little")
    return make_stamp(size.to_bytes(8, "little"), file.read_at(footer, size - 8 - footer))
