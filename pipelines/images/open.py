"""Image sources: every image under a stable key, with its label, decoded only when asked for.

A source lists first and reads later, so that a plan is made before any pixel is touched and a worker reads
only its share. A key names an image within its source and is all that is needed to read it again.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.images.decoding import decode, is_image
from pipelines.images.listing import ImageSource, Listing
from pipelines.images.sources.digits import DigitsSource

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig
    from pipelines.images.files import Files

__all__ = ["ImageSource", "Listing", "decode", "is_on_hub", "open_source"]

TABLES = (".csv", ".tsv", ".jsonl")
USUAL_TABLES = tuple(f"metadata{suffix}" for suffix in (*TABLES, ".parquet"))


def open_source(config: "ImagesConfig") -> ImageSource:
    """The source that a recipe's [images] names. Raises FileNotFoundError or ValueError, telling what to do."""
    from pipelines.images import files
    from pipelines.images.sources import adm, folder, huggingface, parquet, table
    from pipelines.images.sources import webdataset as archives

    if config.path == "digits" and config.format in (None, "digits"):
        return DigitsSource()
    if config.format == "digits":
        raise ValueError(f'images.format: found "digits" with images.path = {config.path!r}; set path = "digits" too')
    if is_on_hub(config):
        return huggingface.open_hub(config)
    place, name = files.locate(config.path)
    kind = config.format or recognise(place, name)
    if kind == "table":
        return table.TableSource(place, name or _table_in(place), config)
    if kind == "parquet":
        return parquet.ParquetSource(place, config, [name] if name else None)
    if kind == "webdataset":
        return archives.WebDatasetSource(place, config, [name] if name else None)
    if kind == "npz" and name:
        return adm.AdmSource(place, name, config)
    if name:
        raise ValueError(
            f'images.path: found the file {place.path(name)} with images.format = "{kind}"; expected a folder'
        )
    return folder.FolderSource(place, config) if kind == "folder" else huggingface.open_folder(place, config)


def is_on_hub(config: "ImagesConfig") -> bool:
    """A hub id looks like a relative path: it is one if its owner is no folder here, or if the format says so."""
    from pipelines.images.sources.huggingface import is_hub_id

    if config.format not in (None, "huggingface") or not is_hub_id(config.path) or Path(config.path).exists():
        return False
    return config.format == "huggingface" or not Path(config.path).parent.exists()


def with_absolute_paths(config: "ImagesConfig") -> "ImagesConfig":
    """Return the same images for workers, which run in other working directories: under an absolute path.

    A data set on a hub is pinned to its current commit, because others may push to it meanwhile.
    """
    from pipelines.images.sources.huggingface import pinned

    if is_on_hub(config):
        return replace(config, path=pinned(config))
    if config.path == "digits" or not Path(config.path).exists():  # a URI
        return config
    return replace(config, path=str(Path(config.path).absolute()))


def recognise(place: "Files", name: str | None = None) -> str:
    """The format of a folder, or of a file in it, from names alone but for Parquet, whose columns decide."""
    if name is not None:
        return _recognise_file(place, name)
    folders, names = place.top()
    if {"state.json", "dataset_dict.json"} & set(names):
        return "huggingface"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    images = any(map(is_image, names))
    if any(name in USUAL_TABLES for name in names) or (images and any(name.endswith(TABLES) for name in names)):
        return "table"
    tables = [name for name in names if name.endswith(".parquet")]
    if tables and not images:
        return _recognise_file(place, tables[0])
    return "folder" if images or not _holds_data_files(place, folders) else "huggingface"


def _recognise_file(place: "Files", name: str) -> str:
    if name.endswith(".parquet"):
        return "parquet" if _has_image_column(place, name) else "table"
    if name.endswith(".tar") or name.endswith(TABLES):
        return "webdataset" if name.endswith(".tar") else "table"
    if name.endswith(".npz"):
        return "npz"
    raise ValueError(
        f"images.path: found the file {place.path(name)}; expected a folder of images, a .parquet, .tar or .npz file, "
        f"or a table of labels ({', '.join(TABLES)}). Unpack an archive first"
    )


def _has_image_column(place: "Files", name: str) -> bool:
    """Whether a Parquet file holds images; if not, it may name them. What is no Parquet at all is said later."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.images.sources.columns import holds_images
    from pipelines.images.sources.table import NAME_COLUMNS

    try:
        with place.open(name) as file:
            schema = pq.read_schema(file)
    except pa.ArrowInvalid:
        return True
    return any(holds_images(field.type) for field in schema) or not set(NAME_COLUMNS) & set(schema.names)


def _holds_data_files(place: "Files", folders: list[str]) -> bool:
    """Whether folders hold Parquet or tar files, as in a hub repository, and not images; the first found decides."""
    for folder in sorted(folders, key=lambda folder: folder != "data"):
        inner, names = place.below(folder).top()
        if any(map(is_image, names)):
            return False
        if any(name.endswith((".parquet", ".tar")) for name in names) or _holds_data_files(place.below(folder), inner):
            return True
    return False


def _table_in(place: "Files") -> str:
    names = place.top()[1]
    tables = [name for name in names if name in USUAL_TABLES] or [name for name in names if name.endswith(TABLES)]
    tables = tables or [name for name in names if name.endswith(".parquet")]
    if len(tables) != 1:
        found = ", ".join(tables) or "none"
        raise ValueError(
            f"images.path: found {found} in {place.root}, expected one table of files and labels such as metadata.csv "
            f"({', '.join(TABLES)}, .parquet). Set images.path to the table itself"
        )
    return tables[0]
