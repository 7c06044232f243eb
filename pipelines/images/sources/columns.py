"""What Parquet and Arrow files have in common: encoded images in a column, in the layout of Hugging Face data sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.dataset_card import declared_classes
from pipelines.images.decoding import try_decode
from pipelines.images.labels import (
    LABEL_COLUMNS,
    choose_column,
    choose_label_column,
    class_label_columns,
    decode_texts,
    huggingface_features,
    is_text,
    number_labels,
    recorded_class_names,
    refuse_missing_labels,
)
from pipelines.images.listing import Listing, Locations, shorten_list
from pipelines.images.source_files import Files
from pipelines.images.splits import describe_files, pick_split, refuse_absent_split
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
"""Columns that are taken for images if images.image_column is not set; the first that exists."""


class FileListing(NamedTuple):
    """What one file contributes to a listing."""

    labels: pa.ChunkedArray | None
    """Labels as stored in the file; None if it has no label column."""
    stamps: np.ndarray
    class_names: tuple[str, ...]
    """Class names that the file or the data set's card records; empty if neither does."""
    locations: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    """Names of the columns besides that of images."""
    image_column: str = ""
    """Name of the image column; see `Listing`."""


class ColumnSource(ABC):
    """Rows of files whose image column is binary, or a struct with a field `bytes`. Keys are FILE#ROW.

    names: the files, relative to the root; by default, all Parquet files under it that belong to the wanted split.
    class_names: class names by column, for files that do not record them. notes: those of the listing. undivided: for
    `names` that were not chosen by a split, a name that may tell which split they are (see `refuse_absent_split`).
    """

    def __init__(
        self,
        files: Files,
        config: "ImagesConfig",
        names: Sequence[str] | None = None,
        class_names: Mapping[str, tuple[str, ...]] | None = None,
        notes: tuple[str, ...] = (),
        undivided: str | None = None,
    ):
        self.files, self.config, self.names, self.undivided = files, config, names, undivided
        self.class_names = class_names or {}
        self.notes = notes

    def listing(self) -> Listing:
        if self.undivided is not None:
            refuse_absent_split(self.config, self.files.root, self.undivided)
        names, notes = self._find_files() if self.names is None else (self.names, self.notes)
        listings = list(self.files.map_names(self._list_file, names))
        counts = [len(listing.stamps) for listing in listings]
        if not sum(counts):
            raise NotFound(
                f"images.path: found no rows in {self.files.root}", "one for each image", "correct images.path"
            )
        keys = [row_key(name, row) for name, count in zip(names, counts, strict=True) for row in range(count)]
        labels, class_names = self._number_labels(names, listings)
        stamps = np.concatenate([listing.stamps for listing in listings])
        locations = [listing.locations for listing in listings if listing.locations is not None]
        return Listing(
            keys,
            labels,
            stamps,
            class_names,
            np.concatenate(locations) if locations else None,
            notes=notes,
            columns=() if class_names else listings[0].columns,
            image_column=listings[0].image_column,
            root=self.files.root,
        )

    def _find_files(self) -> tuple[list[str], tuple[str, ...]]:
        """Return the files of the wanted split, and what to say about the others."""
        names = [name for name in self.files.list_all()[0] if name.endswith(".parquet")]
        if not names:
            raise NotFound(
                f"images.path: found no Parquet files in {self.files.root}",
                "files ending in .parquet",
                "correct images.path, or set images.format",
            )
        earlier = self.config.reading is not None
        picked = pick_split(names, self.config.split, self.files.root, earlier=earlier)
        return picked, describe_files(names, picked, self.config.split)

    def _number_labels(self, names: Sequence[str], listings: list[FileListing]) -> tuple[np.ndarray, tuple[str, ...]]:
        known = self.config.class_names or listings[0].class_names
        columns: list[pa.ChunkedArray] = []
        for name, listing in zip(names, listings, strict=True):
            if listing.labels is not None and self.config.reading is None:
                refuse_missing_labels(listing.labels, partial(row_key, name), self.files.path(name))
            if _kind_of_labels(listing) != _kind_of_labels(listings[0]):
                raise InvalidInput(
                    f"images.path: {self.files.path(name)}: found other labels than in {self.files.path(names[0])}",
                    "the same label column and class names in every file",
                    "separate the files into one data set each",
                )
            if listing.labels is not None:
                number_labels(listing.labels, known, self.files.path(name))  # to name the file of a wrong label
                columns.append(listing.labels)
        if not columns:
            return np.zeros(sum(len(listing.stamps) for listing in listings), np.int32), ()
        return number_labels(_join_labels(columns), known, self.files.root, self.config.class_order)

    @abstractmethod
    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        """Yield the image of each key, in order (see `ImageSource.read`)."""

    @abstractmethod
    def _list_file(self, name: str) -> FileListing:
        """List one file without reading its images."""

    def _image_column(self, schema: pa.Schema, name: str) -> str:
        """Return the column of images. Raises InvalidInput if there is none."""
        where = self.files.path(name)
        image = choose_column(schema.names, self.config.image_column, _usual_columns(schema), "image_column", where)
        if image is None or not holds_images(schema.field(image).type):
            kinds = shorten_list([f"{field.name} ({_shorten_type(field.type)})" for field in schema])
            raise InvalidInput(
                f"images.path: {where}: found the columns {kinds}",
                f"one of {', '.join(IMAGE_COLUMNS)} with encoded images",
                'set images.image_column, or images.format = "table" if the rows name files',
            )
        return image

    def _overridden_column(self, schema: pa.Schema) -> str | None:
        """Return the column that images.image_column would be without the setting; None if it is that one, or none."""
        if self.config.image_column is None or self.config.reading is not None:
            return None
        usual = self._usual_column(schema)
        index = -1 if usual in (None, self.config.image_column) else schema.get_field_index(usual)
        return usual if index >= 0 and holds_images(schema.field(index).type) else None

    def _usual_column(self, schema: pa.Schema) -> str | None:
        """Return the column that is looked for images without images.image_column; None if there is none."""
        return next((name for name in _usual_columns(schema) if name in schema.names), None)

    def _chosen_column(self, schema: pa.Schema) -> str:
        """Return images.image_column if other columns hold images as well; empty otherwise."""
        chosen = self.config.image_column
        if chosen is None or not any(field.name != chosen and holds_image_files(field.type) for field in schema):
            return ""
        return chosen

    def _label_column(self, schema: pa.Schema, name: str) -> str | None:
        """Return the column of labels, or None if there is none. Raises InvalidInput if it is not clear which it is."""
        declared = [*class_label_columns(schema.metadata), *self._declared_labels] if not self.config.reading else []
        return choose_label_column(schema.names, self.config.label_column, declared, self.files.path(name))

    @cached_property
    def _declared_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Class names by column, as the data set's card or its dataset_infos.json declares them beside the files."""
        return self.class_names or declared_classes(self.files, self.config.subset)

    def _class_names(self, schema: pa.Schema, label: str | None) -> tuple[str, ...]:
        recorded = recorded_class_names(schema.metadata, label) or self.class_names.get(label or "", ())
        if recorded or label is None or label in LABEL_COLUMNS or self.config.reading:
            return recorded
        return self._declared_labels.get(label, ())


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold encoded images: bytes of any type, or a struct with them."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_images(kind.storage_type)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_images(field.type) for field in kind)
    return _is_binary(kind) or _is_list_of_bytes(kind)


def holds_image_files(kind: pa.DataType) -> bool:
    """Return whether a column of this type is one of images and hardly of anything else, such as digests."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_image_files(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def byte_lengths(data: pa.Array) -> np.ndarray:
    """Return the number of bytes of each image in a column for which `holds_images` is true, int64 (N,); 0 for null."""
    if isinstance(data, pa.ExtensionArray):
        data = data.storage
    if pa.types.is_struct(data.type):
        return byte_lengths(data.field("bytes"))
    if pa.types.is_binary_view(data.type):
        data = data.cast(pa.large_binary())
    lengths = pc.list_value_length(data) if _is_list_of_bytes(data.type) else pc.binary_length(data)
    return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_list_of_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests) and pa.types.is_uint8(kind.value_type)


def decode_cell(cell: pa.Scalar) -> "Image.Image | Exception":
    """Decode the image in a cell of an image column, or return why it cannot be used."""
    if isinstance(cell, pa.ExtensionScalar):
        return decode_cell(cell.value)
    if isinstance(cell, pa.StructScalar):
        return decode_cell(cell["bytes"]) if cell.is_valid else try_decode(None)
    if isinstance(cell, pa.ListScalar):  # large and fixed-size lists derive from it
        return try_decode(
            cell.values.to_numpy(zero_copy_only=False).astype(np.uint8).tobytes() if cell.is_valid else None
        )
    return try_decode(cell.as_py())


def row_key(name: str, row: int) -> str:
    """Return the key of a file's row."""
    return f"{name}#{row:07d}"


def split_key(key: str) -> tuple[str, int]:
    """Split a key FILE#ROW into the file's name and the row's number."""
    name, _, row = key.rpartition("#")
    return name, int(row)


def _usual_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns that are taken for images if images.image_column is not set, the preferred one first."""
    return (*_marked_as_images(schema), *IMAGE_COLUMNS)


def _marked_as_images(schema: pa.Schema) -> list[str]:
    return [name for name, feature in huggingface_features(schema.metadata).items() if feature.get("_type") == "Image"]


def _shorten_type(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind_of_labels(listing: FileListing) -> tuple[tuple[str, ...], str | None]:
    """Return the class names of a file and what its labels are, whatever type it stores them in."""
    if listing.labels is None:
        return listing.class_names, None
    kind = listing.labels.type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return listing.class_names, "numbers"
    return listing.class_names, "texts" if is_text(kind) else str(kind)


def _join_labels(columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Return the labels of several files, which are of one kind, as one column."""
    if len({column.type for column in columns}) > 1:
        columns = [
            decode_texts(column).cast(pa.large_string() if is_text(column.type) else pa.int64()) for column in columns
        ]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
