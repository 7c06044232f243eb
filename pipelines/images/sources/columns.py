"""Encoded images in a column of Parquet or Arrow files, in the layout of Hugging Face data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.images.decoding import decode
from pipelines.images.files import Files
from pipelines.images.labels import LABEL_COLUMNS, choose_column, class_names_of, features_of, number_labels
from pipelines.images.listing import Listing
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
