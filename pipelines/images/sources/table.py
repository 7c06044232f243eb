"""Image files that a table names together with their labels."""

import csv
import reprlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.images.claimed_sizes import read_parquet_columns
from pipelines.images.decoding import is_image, try_decode
from pipelines.images.labels import (
    LABEL_COLUMNS,
    choose_column,
    choose_label_column,
    class_label_columns,
    decode_texts,
    is_text,
    number_labels,
    parse_numbers,
    recorded_class_names,
    refuse_missing_labels,
)
from pipelines.images.listing import Listing, Locations, shorten_list
from pipelines.images.source_files import Files, ImagesPath
from pipelines.images.sources.columns import holds_image_files
from pipelines.images.splits import ALL_SPLITS, as_splits, find_split_layout, pick_images, refuse_absent_split
from pipelines.images.text_tables import as_utf8, read_json_lines, read_text_table
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer
from raydit.printable import message_of

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
USUAL_NAMES = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
"""Names of tables in Hugging Face's image folders."""
SPLIT_COLUMNS = ("split", "subset", "partition")
"""Columns that say which split a row belongs to, if all that they hold are names of splits."""
NAME_COLUMNS = ("file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path")
"""Columns that are taken for file names if images.image_column is not set; the first that exists."""


def recognise(path: ImagesPath) -> bool:
    """Return whether a path is a table of file names, or a folder with one. Only Parquet's schema is read."""
    if path.name is not None:
        return path.name.endswith(TEXT_SUFFIXES) or (
            path.name.endswith(".parquet") and _names_files(path.files, path.name)
        )
    if any(name in USUAL_NAMES for name in path.names):
        return True
    if any(map(is_image, path.names)):
        return any(name.endswith(TEXT_SUFFIXES) for name in path.names)
    parquet = [name for name in path.names if name.endswith(".parquet")]
    return bool(parquet) and _names_files(path.files, parquet[0])


def _names_files(files: Files, name: str) -> bool:
    """Return whether a Parquet file holds names of images and no images; False for a broken file."""
    import pyarrow.parquet as pq

    try:
        with files.open(name) as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (error.errno or not files.is_local):
            raise
        return False

    names_files = any(field.name in NAME_COLUMNS and is_text(field.type) for field in schema)
    return names_files and not any(holds_image_files(field.type) for field in schema)


def open_table(path: ImagesPath, config: "ImagesConfig") -> "TableSource":
    """Open a table, or the only table in a folder. Raises InvalidInput if the folder holds none or several."""
    return TableSource(path.files, path.name or _find_table(path), config)


def _find_table(path: ImagesPath) -> str:
    names = path.names
    tables = [name for name in names if name in USUAL_NAMES] or [name for name in names if name.endswith(TEXT_SUFFIXES)]
    tables = tables or [name for name in names if name.endswith(".parquet")]
    if len(tables) != 1:
        raise InvalidInput(
            f"images.path: found {', '.join(tables) or 'none'} in {path}",
            f"one table of files and labels such as metadata.csv ({', '.join(TABLE_SUFFIXES)})",
            "set images.path to the table itself",
        )
    return tables[0]


class TableSource:
    """Files named with their labels in a CSV, TSV, JSON Lines or Parquet table; names are relative to its folder.

    Hugging Face's metadata.csv, metadata.jsonl and metadata.parquet (`file_name`) are such tables. The data set is what
    the table names: other images are not part of it, and a named image that does not exist is an error. Keys are the
    names.
    """

    def __init__(self, files: Files, table: str, config: "ImagesConfig"):
        self.files, self.table, self.config = files, table, config

    def listing(self) -> Listing:
        where = self.files.path(self.table)
        table = self._read_table(where)
        name_column = self._name_column(table, where)
        label_column = self._label_column(table, where)
        keys = self._names(table, name_column, where)
        notes: tuple[str, ...] = ()
        if self.config.reading is None:
            inside, notes = self._pick_split(table, keys)
            table, keys = table.take(pa.array(inside)), [keys[index] for index in inside]
            refuse_missing_labels(table.column(label_column), keys.__getitem__, f"{where}, column {label_column}")
        known = self.config.class_names or recorded_class_names(table.schema.metadata, label_column)
        labels, class_names = number_labels(
            table.column(label_column), known, f"{where}, column {label_column}", self.config.class_order
        )
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        keys = [keys[index] for index in order]
        twice = next((key for key, following in zip(keys, keys[1:], strict=False) if key == following), None)
        if twice is not None:
            raise InvalidInput(f"images.path: {where}: found {twice} twice", "each file once", "remove one of the rows")
        sizes = self._sizes(keys, where)
        return Listing(keys, labels[order], sizes, class_names, notes=notes, root=self.files.root)

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        return map(try_decode, self.files.read_each(keys), keys)

    def _pick_split(self, table: pa.Table, keys: list[str]) -> tuple[Sequence[int], tuple[str, ...]]:
        """Return the rows of the wanted split, by a column or by the files' folders, and what to say about it."""
        column = choose_column(table.column_names, None, SPLIT_COLUMNS, "split", self.files.path(self.table))
        groups = [str(value) for value in table.column(column).to_pylist()] if column else []
        splits = as_splits(set(groups)) if groups else None
        if splits is None and (layout := find_split_layout(keys)) and layout.level == 0:
            splits, groups = layout.splits, [key.partition("/")[0] for key in keys]
        if splits is None:
            refuse_absent_split(self.config, self.files.path(self.table), self.table)
        if splits is None or self.config.split == ALL_SPLITS:
            return range(len(keys)), ()
        return pick_images(groups, splits, self.config.split, self.files.path(self.table))

    def _names(self, table: pa.Table, column: str, where: str) -> list[str]:
        names = decode_texts(table.column(column))
        if not len(names):
            raise NotFound(f"images.path: {where}: found no rows", "one for each image", "correct the table")
        if not is_text(names.type) or names.null_count:
            found = (
                "a row without a name" if names.null_count else f"{reprlib.repr(names[0].as_py())} of type {names.type}"
            )
            raise InvalidInput(
                f"images.path: {where}, column {column}: found {found}",
                "the name of a file in every row",
                "correct the table, or set images.image_column",
            )
        return [name.removeprefix("./") for name in names.to_pylist()]

    def _name_column(self, table: pa.Table, where: str) -> str:
        column = choose_column(table.column_names, self.config.image_column, NAME_COLUMNS, "image_column", where)
        return column or self._refuse_columns(table, "image_column", NAME_COLUMNS, "the name of the file", where)

    def _label_column(self, table: pa.Table, where: str) -> str:
        declared = class_label_columns(table.schema.metadata)
        column = choose_label_column(table.column_names, self.config.label_column, declared, where)
        return column or self._refuse_columns(table, "label_column", LABEL_COLUMNS, "the label", where)

    def _refuse_columns(self, table: pa.Table, field: str, usual: Sequence[str], content: str, where: str) -> str:
        purpose = "to do without labels" if field == "label_column" else "if the table does not name the images"
        raise InvalidInput(
            f"images.path: {where}: found the columns {shorten_list(table.column_names)}",
            f"one of {', '.join(usual)} with {content}",
            f'add a line of column names, or set images.{field}, or images.format = "folder" {purpose}',
        )

    def _sizes(self, keys: list[str], where: str) -> np.ndarray:
        names, sizes = self.files.list_all(skip_unreadable=True)
        size_of = dict(zip(names, sizes.tolist(), strict=True))
        missing = [key for key in keys if key not in size_of]
        if missing:
            raise NotFound(
                f"images.path: {where} names {len(missing):,} of {len(keys):,} files that are not in "
                f"{self.files.root}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
                f"{_suggest(missing[0], names)}",
                "names relative to the table's folder",
                "correct the names, or add the files",
            )
        return np.array([size_of[key] for key in keys], np.int64)

    def _read_table(self, where: str) -> pa.Table:
        content = self.files.read_named(self.table)
        refuse_lfs_pointer(content, f"images.path: {where}", "the table")
        # Names such as 00012 stay text; labels become numbers if all of them are written as numbers are.
        names = (*NAME_COLUMNS, self.config.image_column or "file")
        labels = (*LABEL_COLUMNS, self.config.label_column or "label")
        try:
            if self.table.endswith(".parquet"):
                return read_parquet_columns(content, {*names, *labels, *SPLIT_COLUMNS}, where)
            if self.table.endswith(".jsonl"):
                if self.config.reading:
                    return read_json_lines(content, (), where)
                return read_json_lines(as_utf8(content, where), (*names, *labels), where)
            read_labels = None if self.config.reading else partial(parse_numbers, known=self.config.class_names)
            delimiter = "\t" if self.table.endswith(".tsv") else ","
            return read_text_table(content, names, labels, delimiter, where, read_labels)
        except (pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"images.path: {where}: found no readable table ({message_of(error)[:300]})",
                f"{', '.join(TABLE_SUFFIXES)} with a line of column names",
                "correct the table",
            ) from error


def _suggest(name: str, names: list[str]) -> str:
    """Return ' (did you mean "..."?)' if a file of this name is in another folder or has a suffix, else ''."""
    ending = "/" + name.rpartition("/")[2]
    close = next((other for other in names if ("/" + other).endswith(ending) or other.startswith(f"{name}.")), None)
    return f' (did you mean "{close}"?)' if close else ""
