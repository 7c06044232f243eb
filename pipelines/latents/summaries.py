"""What the encode job prints about images and latents."""

from collections.abc import Sequence

from pipelines.config.recipe import Recipe
from pipelines.console import counted
from pipelines.images.listing import Listing
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.dataset import LatentDataset


def describe_images(config: Recipe, images: Listing, listing: Listing, autoencoder: AutoencoderHandle) -> list[str]:
    """Return what a user should know of the images and the autoencoder before images are encoded, line by line.

    images: all images of the recipe. listing: the training images.
    """
    lines = [images.summary()]
    if config.images.class_order == "numeric":
        lines.append(f"classes are the numbers that images have, in order: {_shorten(listing.class_names)}")
    explanation = autoencoder.explain_folder()
    return [*lines, *listing.describe_classes(), *([explanation] if explanation else [])]


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 12 else (*names[:10], "...", names[-1]))


def describe_low_values(count: int) -> str:
    """Return a warning about images that are nearly black because their files hold 10 or 12 of 16 bits."""
    return (
        f"warning: {count:,} images are decoded nearly black: their files have 16 bits per channel but use only values "
        "below 4,096, as 10- and 12-bit cameras write them; scale them to 16 bits first"
    )


def summarize(dataset: LatentDataset) -> str:
    """Describe a data set in one line: images, quarantined images, size and path."""
    count = dataset.num_quarantined
    quarantined = f", {count} quarantined (see quarantine.parquet)" if count else ""
    rows = len(dataset)
    stored = counted(rows, "latent") if dataset.stores_moments else f"{counted(rows, 'image')} to encode while training"
    return f"{stored}{quarantined}, {dataset.num_bytes / 2**20:.1f} MiB in {dataset.path}"
