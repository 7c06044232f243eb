"""What images.validation names: another split of the same data set, or other images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.images.splits import ALL_SPLITS, MAIN_SPLITS, canonical_split

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig


def held_out_source(images: "ImagesConfig") -> "ImagesConfig":
    """Return the [images] by which held-out images are listed and read, those of a recipe unless it has validation."""
    if images.validation is None:
        return images
    if names_split(images.validation):
        return replace(images, split=images.validation, classes=(), validation=None)
    return replace(images, path=images.validation, format=None, split=ALL_SPLITS, classes=(), validation=None)


def names_split(validation: str) -> bool:
    """Return whether images.validation names a split of the same data set, and not other images.

    The words for splits always do, whatever lies in the working directory; "./test" is a folder of that name.
    """
    if "/" in validation or validation == "digits":
        return False
    return canonical_split(validation) in MAIN_SPLITS or not Path(validation).exists()
