"""The images of a latent data set without moments: read from their source again, and compared with what was encoded."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.images.open import open_source
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

    def __init__(self, dataset: "LatentDataset", images: "ImagesConfig", locations: np.ndarray | None):
        """Read which images the rows are of. images: by which they are read. locations: as from `find_locations`."""
        import pyarrow as pa

        self._path, self._images, self._locations = dataset.path, images, locations
        table = pa.concat_tables(dataset.tables([schema.KEY, schema.LABEL, schema.IMAGE_DIGEST]))
        # As one array of 64-bit offsets, in which a row is found at once; Python's strings would take more memory.
        self._keys = table.column(schema.KEY).cast(pa.large_string()).combine_chunks()
        self.labels = table.column(schema.LABEL).to_numpy().astype(np.int64)
        """Class numbers of all rows, int64 (N,)."""
        self._digests = schema.binary_array(table.column(schema.IMAGE_DIGEST), "u1", (schema.DIGEST_BYTES,))

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the keys of the images at some rows."""
        return [self._keys[int(row)].as_py() for row in rows]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the images at some rows, cropped, uint8 (n, size, size, 3).

        Raises InvalidInput, naming them, if some are gone, cannot be decoded, or are not those that were encoded.
        """
        keys, locations = self.keys(rows), None if self._locations is None else self._locations[rows]
        if locations is not None and (is_gone := (locations < 0).any(axis=1)).any():
            self._refuse([keys[index] for index in np.flatnonzero(is_gone)], "are gone")
        images, _, errors = read_cropped(self._images, keys, locations)
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
            f"restore the images, or the version of Pillow that decoded them, or delete {self._path} and run "
            "`raydit encode`, which takes the images as they are now",
        )


def find_locations(dataset: "LatentDataset", images: "ImagesConfig") -> np.ndarray | None:
    """Return where the source has the image of each row, int64 (N, 2); None if it finds images by their keys alone.

    The source is listed again, because images that were added since may have moved others within their file. -1 for
    images that it does not list any more. Raises what listing the source raises.
    """
    import pyarrow as pa
    import pyarrow.compute

    table = pa.concat_tables(dataset.tables([schema.KEY, schema.LOCATION]))
    recorded = schema.binary_array(table.column(schema.LOCATION), schema.LOCATION_DTYPE, (2,))
    if (recorded < 0).any():
        return None
    listing = open_source(images).listing()
    if listing.locations is None:
        return None
    keys = table.column(schema.KEY).cast(pa.large_string())
    found = pa.compute.index_in(keys, value_set=pa.array(listing.keys, pa.large_string()))
    positions = found.fill_null(-1).to_numpy()
    return np.where(positions[:, None] < 0, -1, listing.locations[positions])


def check_source_images(
    dataset: "LatentDataset", images: "ImagesConfig", locations: np.ndarray | None, count: int
) -> None:
    """Read at most `count` images of a data set without moments. Raises what `SourceImages.read` raises.

    locations: as from `find_locations`.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64))
    source = SourceImages(dataset, images, locations)
    for start in range(0, len(rows), CHECKED_AT_ONCE):
        source.read(rows[start : start + CHECKED_AT_ONCE])
