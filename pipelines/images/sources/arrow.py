"""Encoded images in a column of Arrow streams, as Hugging Face's `datasets` saves them to disk."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.images.claimed_sizes import check_rows, explain_broken
from pipelines.images.listing import Locations
from pipelines.images.sources.columns import ColumnSource, FileListing, byte_lengths, decode_cell, split_key
from raydit.lfs import refuse_lfs_pointer

if TYPE_CHECKING:
    from PIL import Image


class ArrowSource(ColumnSource):
    """Rows of Arrow streams. The location of a row is the offset of its record batch, and its position in it."""

    def _list_file(self, name: str) -> FileListing:
        labels, stamps, locations, num_rows = [], [], [], 0
        with self._explain(name), self._open(name) as file:
            schema, num_bytes, where = self._read_schema(file, name), file.size(), self.files.path(name)
            image, label = self._image_column(schema, name), self._label_column(schema, name)
            for offset, batch in self._read_batches(file, schema):
                num_rows += batch.num_rows
                check_rows(num_rows, num_bytes, where)
                data = _validated(batch, image)
                stamps.append(byte_lengths(data))
                locations.append(np.stack([np.full(len(data), offset), np.arange(len(data))], axis=1))
                if label:  # copied: a slice would keep the entire batch in memory
                    labels.append(pa.array(_validated(batch, label).to_pylist(), schema.field(label).type))
        return FileListing(
            pa.chunked_array(labels, schema.field(label).type) if label else None,
            np.concatenate([np.zeros(0, np.int64), *stamps]),
            self._class_names(schema, label),
            np.concatenate([np.zeros((0, 2), np.int64), *locations]),
            tuple(column for column in schema.names if column != image),
            self._chosen_column(schema),
        )

    def _explain(self, name: str) -> AbstractContextManager[None]:
        where = self.files.path(name)
        return explain_broken(where, "Arrow stream", "the files that save_to_disk writes", self.files.is_local)

    def _open(self, name: str) -> pa.NativeFile:
        # Memory-mapped, so that a listing reads lengths and labels but no pixels.
        self.files.refuse_special(name)
        return pa.memory_map(self.files.path(name)) if self.files.is_local else self.files.open(name)

    def _read_schema(self, file: pa.NativeFile, name: str) -> pa.Schema:
        try:
            return pa.ipc.read_schema(pa.ipc.read_message(file))
        except (pa.ArrowInvalid, EOFError):
            refuse_lfs_pointer(file.read_at(min(file.size(), 100), 0), f"images.path: {self.files.path(name)}", "Arrow")
            raise

    def _read_batches(self, file: pa.NativeFile, schema: pa.Schema) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (offset, record batch) of every batch after the schema. Raises EOFError if the end is missing."""
        while True:
            offset = file.tell()
            try:
                message = pa.ipc.read_message(file)
            except EOFError:
                if offset == file.size() or file.tell() < file.size():
                    raise EOFError("its end mark is missing") from None
                return
            yield offset, pa.ipc.read_record_batch(message, schema)

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        named = [split_key(key) for key in keys]
        if locations is None:
            found = {name: self._list_file(name).locations for name in dict.fromkeys(name for name, _ in named)}
            locations = [found[name][row] for name, row in named]  # type: ignore[index]
        pairs = zip((name for name, _ in named), locations, strict=True)
        for name, group in groupby(pairs, key=lambda pair: pair[0]):
            with self._open(name) as file:
                with self._explain(name):
                    schema = self._read_schema(file, name)
                    image = self._image_column(schema, name)
                for offset, run in groupby((location for _, location in group), key=lambda pair: int(pair[0])):
                    with self._explain(name):
                        file.seek(offset)
                        column = _validated(pa.ipc.read_record_batch(pa.ipc.read_message(file), schema), image)
                    yield from (decode_cell(column[int(row)]) for _, row in run)


def _validated(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Return a column of a record batch. Raises ArrowInvalid if its offsets lead out of the file.

    pyarrow reads them without a look, and crashes the process, or shows other memory.
    """
    data = batch.column(column)
    data.validate(full=True)
    return data
