"""Images that could not be used: they are listed with reasons, and too many of them stop the job."""

from collections.abc import Sequence

from cluster import storage
from pipelines.images.claimed_sizes import check_rows, explain_broken, read_text
from pipelines.latents import schema
from pipelines.latents.records import QuarantinedImage
from raydit.errors import InvalidInput

QUARANTINE = "quarantine.parquet"
COLUMNS = ["key", "error"]
ALWAYS_ALLOWED = 10
"""Unusable images that never stop a job, however few images there are, unless encode.max_quarantined is 0."""
MOMENTS_ARE_NAN = "the autoencoder makes NaN of the image"
"""Reason for images that can be read, and that the autoencoder fails on."""
EXAMPLES = 3
"""Unusable images that the error names."""


def write_quarantine(path: str, images: Sequence[QuarantinedImage]) -> None:
    """Write the key and error of every unusable image; an empty table if there are none."""
    import pyarrow as pa

    columns = {name: pa.array([getattr(image, name) for image in images], pa.string()) for name in COLUMNS}
    storage.write_atomically(path, schema.parquet_bytes(pa.table(columns)))


def read_quarantine(path: str) -> list[QuarantinedImage]:
    """Return the images that `write_quarantine` wrote to a path or URI. Raises InvalidInput for anything else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = storage.read_bytes(path)
    with explain_broken(path, "list of images", "what `raydit encode` wrote", True, field=""):
        source = pa.BufferReader(content)
        parquet = pq.ParquetFile(source)
        check_rows(parquet.metadata.num_rows, len(content), path)
        columns = [read_text(parquet, source, name, path).to_pylist() for name in COLUMNS]
    if not all(isinstance(text, str) for column in columns for text in column):
        raise InvalidInput(
            f"{path}: found keys or errors that are no text", "what `raydit encode` wrote", "copy it again"
        )
    return [QuarantinedImage(key, error) for key, error in zip(*columns, strict=True)]


def most_unusable(share: float, num_images: int) -> int:
    """Return how many unusable images do not stop a job. share: encode.max_quarantined. num_images: all images."""
    allowed = max(ALWAYS_ALLOWED, int(share * num_images)) if share else 0
    # A job without a single usable image has failed, however few images it has.
    return min(allowed, num_images - 1)


class QuarantineLimit:
    """Counts unusable images, and stops the job as soon as there are more than allowed.

    folder: path or URI of the latents. share: encode.max_quarantined. num_images: all images of the data set.
    """

    def __init__(self, folder: str, share: float, num_images: int):
        self.folder, self.share, self.num_images = folder, share, num_images
        self.allowed = most_unusable(share, num_images)
        self.images: list[QuarantinedImage] = []

    def add(self, images: Sequence[QuarantinedImage]) -> None:
        """Count further unusable images. Raises InvalidInput if they are too many, after writing the list of them."""
        self.images += images
        if len(self.images) <= self.allowed:
            return
        path = storage.join(self.folder, QUARANTINE)
        write_quarantine(path, self.images)
        nan = [image.key for image in self.images if image.error == MOMENTS_ARE_NAN]
        if 2 * len(nan) > len(self.images):
            raise InvalidInput(
                f"autoencoder: it makes NaN of {len(nan):,} of the {self.num_images:,} images, such as {nan[0]}",
                "finite latents; the images themselves can be read",
                'choose another autoencoder, or set encode.dtype = "float32" if it is another',
            )
        raising = ", or raise encode.max_quarantined," if self.share < 1 else ""
        examples = "; ".join(f"{image.key} ({image.error})" for image in self.images[:EXAMPLES])
        raise InvalidInput(
            f"images.path: found {len(self.images):,} unusable images among {self.num_images:,}, such as {examples}",
            f"at most {self.allowed:,} (encode.max_quarantined = {self.share:g})",
            f"see {path} for all of them so far. Repair them{raising} and run the command "
            "again: finished shards without such images are kept. If images are removed, all shards from the first of "
            "them on are encoded again",
        )
