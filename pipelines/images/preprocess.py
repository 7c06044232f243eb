"""Read images and crop them to squares of the recipe's size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig
    from pipelines.images.listing import ImageSource, Locations


MAX_RESIZED_PIXELS = 2**27
"""Largest image before its centre crop: 400 MB as RGB."""


class CroppedImages(NamedTuple):
    """Some images of a source, cropped."""

    images: np.ndarray
    """uint8 (n, size, size, 3): those that could be used, in order."""
    positions: list[int]
    """Positions of those n among the keys that were asked for."""
    errors: dict[str, str]
    """Keys of the others, and why each cannot be used."""


def crop_image(image: "Image.Image", size: int, crop: str) -> np.ndarray:
    """Crop an image to uint8 (size, size, 3).

    crop "adm": halve with a box filter while the short side is at least twice `size`, resize the short side to `size`
    (bicubic), take the centre (Dhariwal & Nichol 2021, arXiv 2105.05233). crop "resize": resize to a square (bicubic).
    Raises ValueError if the image is so long and thin that it would fill the memory before its ends are cropped.
    """
    from PIL import Image

    image = image if image.mode == "RGB" else image.convert("RGB")
    if crop == "resize":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_RESIZED_PIXELS:
        # Written to the quarantine, where the text must stay the same from version to version.
        raise ValueError(
            f"found {image.width:,} x {image.height:,} pixels, which become {width:,} x {height:,} before the crop; "
            f"expected at most {MAX_RESIZED_PIXELS:,} pixels"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    # Cropped before it becomes an array, of which a slice would keep all pixels in memory.
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_cropped(config: "ImagesConfig", keys: Sequence[str], locations: "Locations | None" = None) -> CroppedImages:
    """Read the images of some keys and crop them. An image that cannot be used does not stop the others.

    locations: those of the keys in the listing (`Listing.locations`), if it has any.
    """
    return read_cropped_counting_low(config, keys, locations)[0]


def read_cropped_counting_low(
    config: "ImagesConfig", keys: Sequence[str], locations: "Locations | None" = None
) -> tuple[CroppedImages, int]:
    """Do what `read_cropped` does; also return how many of the images have 16 bits a channel and use the lower 12.

    They are nearly black (see `pipelines.images.decoding.LOW_VALUES`).
    """
    from pipelines.images.decoding import LOW_VALUES, quarantine_reason

    images, positions, errors, num_low = [], [], {}, 0
    for position, image in enumerate(_open_once(config).read(keys, locations)):
        try:
            if isinstance(image, Exception):
                raise image
            images.append(crop_image(image, config.size, config.crop))
            positions.append(position)
            num_low += bool(image.info.get(LOW_VALUES))
        except Exception as error:
            errors[keys[position]] = quarantine_reason(error)
    none = np.zeros((0, config.size, config.size, 3), np.uint8)
    return CroppedImages(np.stack(images) if images else none, positions, errors), num_low


def _open_once(config: "ImagesConfig") -> "ImageSource":
    """Open a source once in a process, because recognising a format lists a folder."""
    if not config.path.endswith(".npz"):
        return _open(config)
    from pipelines.images.source_files import find_images_path

    # The source of an .npz file keeps its arrays, which must not outlast the file in a process that lives on.
    path = find_images_path(config.path)
    return _open(config, path.files.version(path.name) if path.name else None)


@lru_cache(maxsize=4)
def _open(config: "ImagesConfig", version: tuple[int | None, int | None] | None = None) -> "ImageSource":
    """Open a source, or return the one of an earlier call. version: the file's (see `Files.version`)."""
    from pipelines.images.open import open_source

    return open_source(config)
