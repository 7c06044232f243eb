"""Encoded images in a column of Arrow streams, as `datasets` saves to disk."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.sources.columns import ColumnSource, Part, _place

if TYPE_CHECKING:
    from PIL import Image


class ArrowSource(ColumnSource):
    """Arrow streams, as `datasets` saves to disk. A place is the offset of a record batch, and the row in it."""

    def _part(self, name: str) -> Part:
        labels, stamps, places = [], [], []
        with self._open(name) as file:
            batches = self._batches(file, name)
            schema = next(batches)
            image, label = self._columns(schema, name)
            for offset, batch in batches:
                data = batch.column(image)
                data = data.field("bytes") if pa.types.is_struct(data.type) else data
                stamps.append(pc.fill_null(pc.binary_length(data), 0).to_numpy().astype(np.int64))
                places.append(np.stack([np.full(len(data), offset), np.arange(len(data))], axis=1))
                if label:  # rebuilt: a slice would keep the whole batch in memory
                    labels.append(pa.array(batch.column(label).to_pylist(), schema.field(label).type))
        return Part(
            pa.chunked_array(labels, schema.field(label).type) if label else None,
            np.concatenate([np.zeros(0, np.int64), *stamps]),
            self._class_names(schema, label),
            np.concatenate([np.zeros((0, 2), np.int64), *places]),
        )

    def _open(self, name: str) -> pa.NativeFile:
        # Mapped, so that a listing touches lengths and labels but no pixels.
        return pa.memory_map(self.files.path(name)) if self.files.is_local else self.files.open(name)

    def _batches(self, file: pa.NativeFile, name: str) -> Iterator[Any]:
        """The schema, then (offset, record batch) of every batch."""
        try:
            schema = pa.ipc.read_schema(pa.ipc.read_message(file))
            yield schema
            while True:
                offset = file.tell()
                try:
                    message = pa.ipc.read_message(file)
                except EOFError:
                    if offset == file.size() or file.tell() < file.size():
                        raise EOFError("its end mark is missing") from None
                    return
                yield offset, pa.ipc.read_record_batch(message, schema)
        except (pa.ArrowInvalid, EOFError) as error:
            raise ValueError(
                f"images.path: {self.files.path(name)}: found what is not an Arrow stream ({error}), expected the "
                "files that save_to_disk writes; copy it again"
            ) from error

    def read(
        self, keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
    ) -> Iterator["Image.Image | Exception"]:
        named = [_place(key) for key in keys]
        if places is None:
            found = {name: self._part(name).places for name in dict.fromkeys(name for name, _ in named)}
            places = [found[name][row] for name, row in named]  # type: ignore[index]
        at = zip((name for name, _ in named), places, strict=True)
        for name, group in groupby(at, key=lambda pair: pair[0]):
            with self._open(name) as file:
                schema = pa.ipc.read_schema(pa.ipc.read_message(file))
                image, _ = self._columns(schema, name)
                for offset, run in groupby((place for _, place in group), key=lambda place: int(place[0])):
                    file.seek(offset)
                    column = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema).column(image)
                    yield from (self._decode(column[int(row)]) for _, row in run)
