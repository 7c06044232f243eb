"""The images of a latent data set without moments: read from their source again, and compared with what was encoded."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.images.preprocess import read_cropped
from pipelines.latents import schema
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig
    from pipelines.latents.dataset import LatentDataset

EXAMPLES = 3
"""Images that an error names."""
CHECKED_AT_ONCE = 64


def image_digests(images: np.ndarray) -> np.ndarray:
    """Return the BLAKE2b-128 of each image, uint8 (n, 16). images: uint8 (n, H, W, 3)."""
    size = schema.DIGEST_BYTES
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=size).digest() for image in images)
    return np.frombuffer(digests, np.uint8).reshape(-1, size)


class SourceImages:
    """Reads the images of a data set's rows, in any order and from several threads."""

    def __init__(self, dataset: "LatentDataset", images: "ImagesConfig"):
        """Read which images the rows are of. images: by which they are read."""
        import pyarrow as pa

        self._path, self._images = dataset.path, images
        columns = [schema.KEY, schema.LABEL, schema.IMAGE_DIGEST, schema.LOCATION]
        table = pa.concat_tables(dataset.tables(columns))
        # As one array of 64-bit offsets, in which a row is found at once; Python's strings would take more memory.
        self._keys = table.column(schema.KEY).cast(pa.large_string()).combine_chunks()
        self.labels = table.column(schema.LABEL).to_numpy().astype(np.int64)
        """Class numbers of all rows, int64 (N,)."""
        self._digests = schema.binary_array(table.column(schema.IMAGE_DIGEST), "u1", (schema.DIGEST_BYTES,))
        locations = schema.binary_array(table.column(schema.LOCATION), schema.LOCATION_DTYPE, (2,))
        self._locations = locations if (locations >= 0).all() else None

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the keys of the images at some rows."""
        return [self._keys[int(row)].as_py() for row in rows]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the images at some rows, cropped, uint8 (n, size, size, 3).

        Raises InvalidInput, naming them, if some are gone, cannot be decoded, or are not those that were encoded.
        """
        keys = self.keys(rows)
        images, _, errors = read_cropped(self._images, keys, None if self._locations is None else self._locations[rows])
        if errors:
            self._refuse([f"{key} ({error})" for key, error in errors.items()], "cannot be read any more")
        is_other = (image_digests(images) != self._digests[rows]).any(axis=1)
        if is_other.any():
            self._refuse([keys[index] for index in np.flatnonzero(is_other)], "are not those that were encoded")
        return images

    def _refuse(self, images: Sequence[str], problem: str) -> None:
        shown = ", ".join(images[:EXAMPLES]) + (", ..." if len(images) > EXAMPLES else "")
        raise InvalidInput(
            f"images.path: {len(images)} images in {self._images.path} {problem}, such as {shown}",
            f"the pixels that `raydit encode` found for {self._path}, which holds no moments (encode.store = false)",
            "restore the images and run the same command again, or run `raydit encode` again, which starts over with "
            "the images that there are; other versions of Pillow can decode other pixels",
        )


def check_source_images(dataset: "LatentDataset", images: "ImagesConfig", count: int) -> None:
    """Read at most `count` images of a data set without moments. Raises what `SourceImages.read` raises."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64))
    source = SourceImages(dataset, images)
    for start in range(0, len(rows), CHECKED_AT_ONCE):
        source.read(rows[start : start + CHECKED_AT_ONCE])
