"""Encoded images in a column of Parquet or Arrow files, in the layout of Hugging Face data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.decoding import decode
from pipelines.images.files import Files
from pipelines.images.labels import LABEL_COLUMNS, choose_column, class_names_of, features_of, number_labels
from pipelines.images.listing import Listing, stamp_of
from pipelines.images.splits import pick_split

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

IMAGE_COLUMNS = ("image", "img", "jpg", "png")


class Part(NamedTuple):
    """What one file contributes to a listing."""

    labels: pa.ChunkedArray | None
    stamps: np.ndarray
    class_names: tuple[str, ...]
    places: np.ndarray | None = None


class ColumnSource(ABC):
    """Rows of files whose image column is binary, or a struct with a field `bytes`; keys are FILE#ROW.

    names: the files, relative to the root; when left out, all below it that belong to the wanted split.
    class_names: by column, where the files do not say.
    """

    def __init__(
        self,
        files: Files,
        config: "ImagesConfig",
        names: Sequence[str] | None = None,
        class_names: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self.files, self.config, self.names = files, config, names
        self.class_names = class_names or {}

    def listing(self) -> Listing:
        names = self._find() if self.names is None else self.names
        parts = list(self.files.each(self._part, names))
        counts = [len(part.stamps) for part in parts]
        if not sum(counts):
            raise FileNotFoundError(f"images.path: found no rows in {self.files.root}, expected one for each image")
        keys = [f"{name}#{row:07d}" for name, count in zip(names, counts, strict=True) for row in range(count)]
        labels, class_names = self._labels(names, parts)
        stamps = np.concatenate([part.stamps for part in parts])
        places = [part.places for part in parts if part.places is not None]
        return Listing(keys, labels, stamps, class_names, np.concatenate(places) if places else None)

    def _find(self) -> list[str]:
        names = [name for name in self.files.listing()[0] if name.endswith(".parquet")]
        if not names:
            raise FileNotFoundError(
                f"images.path: no Parquet files in {self.files.root}; expected files ending in .parquet"
            )
        return pick_split(names, self.config.split, self.files.root)

    def _labels(self, names: Sequence[str], parts: list[Part]) -> tuple[np.ndarray, tuple[str, ...]]:
        known = self.config.class_names or parts[0].class_names
        chunks: list[pa.Array] = []
        for name, part in zip(names, parts, strict=True):
            if _kind_of_labels(part) != _kind_of_labels(parts[0]):
                raise ValueError(
                    f"images.path: {self.files.path(name)}: found other labels than in {self.files.path(names[0])}, "
                    "expected the same label column and class names in every file. Make them separate data sets"
                )
            if part.labels is not None:
                number_labels(part.labels, known, self.files.path(name))  # names the file of a wrong label
                chunks += part.labels.chunks
        if parts[0].labels is None:
            return np.zeros(sum(len(part.stamps) for part in parts), np.int32), ()
        return number_labels(pa.chunked_array(chunks, parts[0].labels.type), known, self.files.root)

    @abstractmethod
    def read(
        self, keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
    ) -> Iterator["Image.Image | Exception"]: ...

    @abstractmethod
    def _part(self, name: str) -> Part:
        """What one file contributes, without its images."""

    def _columns(self, schema: pa.Schema, name: str) -> tuple[str, str | None]:
        """The columns of images and of labels."""
        where = self.files.path(name)
        usual = (*_marked_as_images(schema), *IMAGE_COLUMNS)
        image = choose_column(schema.names, self.config.image_column, usual, "image_column", where)
        if image is None or not holds_images(schema.field(image).type):
            kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise ValueError(
                f"images.path: {where} has the columns {kinds}; expected one of {', '.join(IMAGE_COLUMNS)} with "
                'encoded images. Set images.image_column, or images.format = "table" if the rows name files'
            )
        return image, choose_column(schema.names, self.config.label_column, LABEL_COLUMNS, "label_column", where)

    def _class_names(self, schema: pa.Schema, label: str | None) -> tuple[str, ...]:
        return class_names_of(schema.metadata, label) or self.class_names.get(label or "", ())

    def _decode(self, cell: pa.Scalar) -> "Image.Image | Exception":
        value = cell.as_py()
        try:
            return decode(value["bytes"] if isinstance(value, dict) else value)
        except Exception as error:
            return error


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column's type can hold encoded images."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_images(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _marked_as_images(schema: pa.Schema) -> list[str]:
    return [name for name, feature in features_of(schema.metadata).items() if feature.get("_type") == "Image"]


def _kind_of_labels(part: Part) -> tuple:
    return part.class_names, None if part.labels is None else part.labels.type


def _place(key: str) -> tuple[str, int]:
    name, _, row = key.rpartition("#")
    return name, int(row)


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
