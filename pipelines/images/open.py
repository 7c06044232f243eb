"""Open the source of images that a recipe names. `FORMATS` holds all layouts of files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.images.listing import ImageSource
from pipelines.images.source_files import ImagesPath, find_images_path
from pipelines.images.sources import adm, digits, folder, huggingface, parquet, table, webdataset
from pipelines.images.subset import ClassSubset
from pipelines.images.validation import held_out_source, names_split
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig


class Format(NamedTuple):
    """A layout of images in files."""

    recognise: Callable[[ImagesPath], bool]
    """Whether a path has this layout, by names alone if possible."""
    open: "Callable[[ImagesPath, ImagesConfig], ImageSource]"
    """Open a path that has this layout."""


FORMATS: dict[str, Format] = {
    "huggingface": Format(huggingface.recognise, huggingface.open_dataset),
    "webdataset": Format(webdataset.recognise, webdataset.open_shards),
    "table": Format(table.recognise, table.open_table),
    "parquet": Format(parquet.recognise, parquet.open_parquet),
    "npz": Format(adm.recognise, adm.open_npz),
    "folder": Format(folder.recognise, folder.open_folder),
}
"""Formats by their names in images.format, tried in this order where it is not set. The last takes any folder."""


def open_source(config: "ImagesConfig") -> ImageSource:
    """Open the image source of a recipe's [images], of which images.classes may take a part.

    Raises NotFound or InvalidInput.
    """
    source = _open_all(config)
    return ClassSubset(source, config.classes) if config.classes else source


def _open_all(config: "ImagesConfig") -> ImageSource:
    """Open the image source with all of its classes."""
    if config.path == "digits" and config.format in (None, "digits"):
        return digits.DigitsSource(config)
    if config.format == "digits":
        raise InvalidInput(
            f'images.format: found "digits" with images.path = {config.path!r}', 'images.path = "digits"', "set it"
        )
    if is_on_hub(config):
        return huggingface.open_hub(config)
    path = find_images_path(config.path)
    return FORMATS[config.format or recognise(path)].open(path, config)


def is_on_hub(config: "ImagesConfig") -> bool:
    """Return whether images.path is an id on the Hugging Face hub.

    An id looks like a relative path. It is taken for an id if no folder has the owner's name, or if images.format is
    "huggingface".
    """
    if config.format not in (None, "huggingface") or not huggingface.is_hub_id(config.path):
        return False
    if Path(config.path).exists():
        return False
    return config.format == "huggingface" or not Path(config.path).parent.exists()


def with_absolute_paths(config: "ImagesConfig") -> "ImagesConfig":
    """Return the same images for workers, which run in other working directories: under an absolute path.

    A data set on a hub is pinned to its current commit, because others may push to it meanwhile.
    """
    if config.validation is not None and not names_split(config.validation):
        config = replace(config, validation=with_absolute_paths(held_out_source(config)).path)
    if is_on_hub(config):
        return replace(config, path=huggingface.pin_revision(config))
    if config.path == "digits" or not Path(config.path).exists():  # a URI
        return config
    return replace(config, path=str(Path(config.path).absolute()))


def recognise(path: ImagesPath) -> str:
    """Return the name of the first format that recognises a path. Raises InvalidInput if none does."""
    for name, format in FORMATS.items():
        if format.recognise(path):
            return name
    raise InvalidInput(
        f"images.path: found the file {path}",
        f"a folder of images, a .parquet, .tar or .npz file, or a table of labels ({', '.join(table.TEXT_SUFFIXES)})",
        "unpack an archive first",
    )
