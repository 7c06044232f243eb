"""Reading and cropping: any image to a square of the recipe's size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig
    from pipelines.images.listing import ImageSource


MOST_PIXELS = 2**27
"""Of an image on its way to the crop: 400 MB."""


def crop_image(image: "Image.Image", size: int, crop: str) -> np.ndarray:
    """Image -> uint8 (size, size, 3).

    crop "adm": halve with a box filter while the short side is at least twice `size`, bicubic to the short
    side, centre crop (Dhariwal & Nichol 2021, arXiv 2105.05233). crop "resize": bicubic to a square. Raises
    ValueError for an image so long and thin that it would fill the memory before its ends are cropped.
    """
    from PIL import Image

    image = image.convert("RGB")
    if crop == "resize":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"found {image.width:,} x {image.height:,} pixels, which become {width:,} x {height:,} before the crop; "
            f"expected at most {MOST_PIXELS:,} pixels"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def read_cropped(
    config: "ImagesConfig", keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
) -> tuple[np.ndarray, list[int], dict[str, str]]:
    """Read and crop images: uint8 (n, size, size, 3), the positions in `keys` of those n, key -> why not.

    places: those of the keys in the listing, where it has some. One bad image never stops the others.
    """
    from pipelines.images.decoding import reason

    images, good, errors = [], [], {}
    for position, image in enumerate(_source(config).read(keys, places)):
        try:
            if isinstance(image, Exception):
                raise image
            images.append(crop_image(image, config.size, config.crop))
            good.append(position)
        except Exception as error:
            errors[keys[position]] = reason(error)
    empty = np.zeros((0, config.size, config.size, 3), np.uint8)
    return np.stack(images) if images else empty, good, errors


@lru_cache(maxsize=4)
def _source(config: "ImagesConfig") -> "ImageSource":
    """Opened once in a process: recognising a format lists a folder."""
    from pipelines.images.open import open_source

    return open_source(config)
