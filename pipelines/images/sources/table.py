"""Image files named with their labels in one table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.images.files import Files
from pipelines.images.labels import LABEL_COLUMNS, choose_column, class_names_of, number_labels
from pipelines.images.listing import Listing
from pipelines.images.sources.folder import ImageFiles

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
NAME_COLUMNS = ("file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path")


class TableSource(ImageFiles):
    """Files named with their labels in a CSV, TSV, JSON Lines or Parquet table; names are relative to its folder.

    Hugging Face's metadata.csv, metadata.jsonl and metadata.parquet (`file_name`) are such tables. The table
    decides: an image that it does not name is not part of the data set, and one that is not there is an error.
    """

    def __init__(self, files: Files, table: str, config: "ImagesConfig"):
        super().__init__(files, config)
        self.table = table

    def listing(self) -> Listing:
        where = self.files.path(self.table)
        table = self._read_table(where)
        name_column = self._column(table, "image_column", NAME_COLUMNS, "the name of the file", where)
        label_column = self._column(table, "label_column", LABEL_COLUMNS, "the label", where)
        keys = self._names(table, name_column, where)
        known = self.config.class_names or class_names_of(table.schema.metadata, label_column)
        labels, class_names = number_labels(table.column(label_column), known, f"{where}, column {label_column}")
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        keys = [keys[place] for place in order]
        twice = next((key for key, after in zip(keys, keys[1:], strict=False) if key == after), None)
        if twice is not None:
            raise ValueError(
                f"images.path: {where}: found {twice} twice, expected each file once; remove one of the rows"
            )
        return Listing(keys, labels[order], self._sizes(keys, where), class_names)

    def _names(self, table: pa.Table, column: str, where: str) -> list[str]:
        names = table.column(column)
        if not len(names):
            raise FileNotFoundError(f"images.path: {where}: found no rows, expected one for each image")
        if not pa.types.is_string(names.type) or names.null_count:
            found = "a row without a name" if names.null_count else f"{names[0].as_py()!r}, a {names.type}"
            raise ValueError(
                f"images.path: {where}, column {column}: found {found}, expected the name of a file in every row; "
                "correct the table, or set images.image_column"
            )
        return [name.removeprefix("./") for name in names.to_pylist()]

    def _column(self, table: pa.Table, field: str, usual: Sequence[str], holds: str, where: str) -> str:
        column = choose_column(table.column_names, getattr(self.config, field), usual, field, where)
        if column is None:
            further = ', or images.format = "folder" to do without labels' if field == "label_column" else ""
            raise ValueError(
                f"images.path: {where} has the columns {', '.join(table.column_names)}; expected one of "
                f"{', '.join(usual)} with {holds}. Add a line of column names, or set images.{field}{further}"
            )
        return column

    def _sizes(self, keys: list[str], where: str) -> np.ndarray:
        names, sizes = self.files.listing()
        size_of = dict(zip(names, sizes.tolist(), strict=True))
        missing = [key for key in keys if key not in size_of]
        if missing:
            hint = _elsewhere(missing[0], names)
            raise FileNotFoundError(
                f"images.path: {where} names {len(missing):,} of {len(keys):,} files that are not in "
                f"{self.files.root}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}{hint}; expected "
                "names relative to the table's folder. Correct them, or bring the files"
            )
        return np.array([size_of[key] for key in keys], np.int64)

    def _read_table(self, where: str) -> pa.Table:
        import pyarrow.csv
        import pyarrow.json
        import pyarrow.parquet

        data = pa.BufferReader(self.files.read(self.table))
        try:
            if self.table.endswith(".parquet"):
                return pyarrow.parquet.read_table(data)
            if self.table.endswith(".jsonl"):
                return pyarrow.json.read_json(data)
            # Names such as 00012 stay text; labels become numbers where all of them are.
            names = dict.fromkeys((*NAME_COLUMNS, self.config.image_column or "file"), pa.string())
            return pyarrow.csv.read_csv(
                data,
                parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if self.table.endswith(".tsv") else ","),
                convert_options=pyarrow.csv.ConvertOptions(column_types=names),
            )
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"images.path: {where}: found what is no table ({error}), expected {', '.join(TABLE_SUFFIXES)} with a "
                "line of column names; correct it"
            ) from error


def _elsewhere(name: str, names: list[str]) -> str:
    """A file that the name of a missing one may have meant: in another folder, or with its suffix."""
    ending = "/" + name.rpartition("/")[2]
    close = next((other for other in names if ("/" + other).endswith(ending) or other.startswith(f"{name}.")), None)
    return f' (did you mean "{close}"?)' if close else ""
