"""Files of images, as the autoencoder job writes them."""

from pathlib import Path

import numpy as np

from pipelines.training.data.image_files import ImageFile, ImageRows


def image_rows(folder: Path, *blocks: np.ndarray, size: int = 16) -> ImageRows:
    """Rows of images, of which each block, uint8 (n, size, size, 3), is in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, block in enumerate(blocks):
        path = folder / f"{number}.u8"
        path.write_bytes(block.tobytes())
        files.append(ImageFile(str(path), len(block)))
    return ImageRows(files, size)
