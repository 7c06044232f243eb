"""What Parquet and Arrow files have in common: encoded images in a column, in the layout of Hugging Face data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.images.decoding import try_decode
from pipelines.images.files import Files
from pipelines.images.labels import (
    LABEL_COLUMNS,
    choose_column,
    huggingface_features,
    number_labels,
    recorded_class_names,
)
from pipelines.images.listing import Listing, Locations
from pipelines.images.splits import pick_split
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
"""Columns that are taken for images if images.image_column is not set; the first that exists."""


class FileListing(NamedTuple):
    """What one file contributes to a listing."""

    labels: pa.ChunkedArray | None
    """As the file has them; None without a label column."""
    stamps: np.ndarray
    class_names: tuple[str, ...]
    """As the file or the data set's card records them; empty if neither does."""
    locations: np.ndarray | None = None


class ColumnSource(ABC):
    """Rows of files whose image column is binary, or a struct with a field `bytes`. Keys are FILE#ROW.

    names: the files, relative to the root; by default, all Parquet files under it that belong to the wanted split.
    class_names: class names by column, for files that do not record them.
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
        names = self._find_files() if self.names is None else self.names
        listings = list(self.files.map_names(self._list_file, names))
        counts = [len(listing.stamps) for listing in listings]
        if not sum(counts):
            raise NotFound(
                f"images.path: found no rows in {self.files.root}", "one for each image", "correct images.path"
            )
        keys = [f"{name}#{row:07d}" for name, count in zip(names, counts, strict=True) for row in range(count)]
        labels, class_names = self._number_labels(names, listings)
        stamps = np.concatenate([listing.stamps for listing in listings])
        locations = [listing.locations for listing in listings if listing.locations is not None]
        return Listing(keys, labels, stamps, class_names, np.concatenate(locations) if locations else None)

    def _find_files(self) -> list[str]:
        names = [name for name in self.files.list_all()[0] if name.endswith(".parquet")]
        if not names:
            raise NotFound(
                f"images.path: found no Parquet files in {self.files.root}",
                "files ending in .parquet",
                "correct images.path, or set images.format",
            )
        return pick_split(names, self.config.split, self.files.root)

    def _number_labels(self, names: Sequence[str], listings: list[FileListing]) -> tuple[np.ndarray, tuple[str, ...]]:
        known = self.config.class_names or listings[0].class_names
        chunks: list[pa.Array] = []
        for name, listing in zip(names, listings, strict=True):
            if _kind_of_labels(listing) != _kind_of_labels(listings[0]):
                raise InvalidInput(
                    f"images.path: {self.files.path(name)}: found other labels than in {self.files.path(names[0])}",
                    "the same label column and class names in every file",
                    "separate the files into one data set each",
                )
            if listing.labels is not None:
                number_labels(listing.labels, known, self.files.path(name))  # to name the file of a wrong label
                chunks += listing.labels.chunks
        if listings[0].labels is None:
            return np.zeros(sum(len(listing.stamps) for listing in listings), np.int32), ()
        return number_labels(
            pa.chunked_array(chunks, listings[0].labels.type), known, self.files.root, self.config.class_order
        )

    @abstractmethod
    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        """Yield the image of each key, in order (see `ImageSource.read`)."""

    @abstractmethod
    def _list_file(self, name: str) -> FileListing:
        """List one file without reading its images."""

    def _columns(self, schema: pa.Schema, name: str) -> tuple[str, str | None]:
        """Return the columns of images and of labels. Raises InvalidInput if there is no column of images."""
        where = self.files.path(name)
        usual = (*_marked_as_images(schema), *IMAGE_COLUMNS)
        image = choose_column(schema.names, self.config.image_column, usual, "image_column", where)
        if image is None or not holds_images(schema.field(image).type):
            kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InvalidInput(
                f"images.path: {where}: found the columns {kinds}",
                f"one of {', '.join(IMAGE_COLUMNS)} with encoded images",
                'set images.image_column, or images.format = "table" if the rows name files',
            )
        return image, choose_column(schema.names, self.config.label_column, LABEL_COLUMNS, "label_column", where)

    def _class_names(self, schema: pa.Schema, label: str | None) -> tuple[str, ...]:
        return recorded_class_names(schema.metadata, label) or self.class_names.get(label or "", ())


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold encoded images."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_images(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def decode_cell(cell: pa.Scalar) -> "Image.Image | Exception":
    """Decode the image in a cell of an image column, or return why it cannot be used."""
    value = cell.as_py()
    return try_decode(value["bytes"] if isinstance(value, dict) else value)


def split_key(key: str) -> tuple[str, int]:
    """Split a key FILE#ROW into the file's name and the row's number."""
    name, _, row = key.rpartition("#")
    return name, int(row)


def _marked_as_images(schema: pa.Schema) -> list[str]:
    return [name for name, feature in huggingface_features(schema.metadata).items() if feature.get("_type") == "Image"]


def _kind_of_labels(listing: FileListing) -> tuple[tuple[str, ...], pa.DataType | None]:
    return listing.class_names, None if listing.labels is None else listing.labels.type
