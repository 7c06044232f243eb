"""List the images of an output as its existing latents were listed, so that splits and classes do not change."""

from collections.abc import Sequence
from dataclasses import replace

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.listing import Listing, shorten_list
from pipelines.images.open import open_source
from pipelines.latents.class_order import in_numeric_order, recorded_digests, with_class_order
from pipelines.latents.dataset import MANIFEST, LatentDataset
from pipelines.latents.shards import recorded_keys
from raydit.errors import InvalidInput, NotFound

KEPT_READING = (
    "splits, labels and image files are recognised as in an earlier release, because this output was made so; another "
    "output reads the images anew"
)
"""Notice that a stage prints if `list_images` fills in images.reading."""


def list_recorded_images(images: ImagesConfig, latents: str, output: str) -> tuple[ImagesConfig, Listing]:
    """List all images of an output, held-out ones included; also return their config, with images.reading filled in.

    It becomes "earlier" only where the output holds latents or an autoencoder of images that were listed so, and where
    that makes a difference. Without a difference, digests are the same in both readings.
    latents, output: paths or URIs. Raises NotFound or InvalidInput.
    """
    recorded = recorded_digests(latents, output)
    refused: InvalidInput | NotFound | None = None
    listing = None
    try:
        listing = open_source(images).listing()
    except (InvalidInput, NotFound) as error:
        refused = error
    if images.reading is None and recorded and not recorded & _training_digests(images, listing):
        earlier_images = replace(images, reading="earlier")
        try:
            earlier = open_source(earlier_images).listing()
        except (InvalidInput, NotFound):
            earlier = None
        if earlier is not None and _was_listed_so(images, earlier, listing, recorded, latents):
            return earlier_images, earlier
    if listing is None:
        assert refused is not None, "either a listing or an error"
        raise refused
    return images, listing


def list_images(config: Recipe) -> tuple[Recipe, Listing]:
    """List all images of a recipe, held-out ones included; also return the recipe as its output was begun.

    images.reading is filled in first (see `list_recorded_images`), then images.class_order (see `with_class_order`).
    """
    images, listing = list_recorded_images(config.images, config.latents, storage.absolute(config.output))
    return with_class_order(config if images is config.images else replace(config, images=images), listing)


def require_classes(config: Recipe, class_names: Sequence[str], columns: Sequence[str], artifact: str) -> None:
    """Raise InvalidInput if a recipe asks for classes and its images have none, unless the artifact exists already.

    columns: those that the images have besides. artifact: path or URI of the folder of what is made of the images; a
    finished or started one continues as it began.
    """
    asked = _asks_for_classes(config)
    if not asked or class_names or Artifact("", artifact, {}).recorded() is not None:
        return
    looked = f", which have the columns {shorten_list(columns)}" if columns else ""
    raise InvalidInput(
        f"images.path: found no classes for the images in {config.images.path}{looked}, although the recipe asks for "
        f"them by {' and '.join(asked)}",
        "a column of labels, a folder for each class, or a recipe without classes",
        "set images.label_column to the column of labels, or for images without classes "
        'evaluate.cfg_scale = 1.0 and evaluate.labels = "random"',
    )


def _asks_for_classes(config: Recipe) -> list[str]:
    asked = []
    if config.evaluate.needs_null_class:
        asked.append(f"evaluate.cfg_scale = {config.evaluate.cfg_scale:g}")
    if config.evaluate.labels == "balanced":
        asked.append('evaluate.labels = "balanced"')
    if config.images.class_names:
        asked.append("images.class_names")
    return asked


def _training_digests(images: ImagesConfig, listing: Listing | None) -> set[str]:
    """Return the digests of a listing's training images, in each order that its classes may have."""
    return {each.split(images.held_out)[0].digest for each in _in_each_order(images, listing)}


def _in_each_order(images: ImagesConfig, listing: Listing | None) -> list[Listing]:
    """Return a listing in each order that its classes may have in an output; none for None."""
    if listing is None:
        return []
    numeric = in_numeric_order(images, listing)
    return [listing] if numeric is None else [listing, numeric]


def _was_listed_so(
    images: ImagesConfig, earlier: Listing, listing: Listing | None, recorded: set[str], latents: str
) -> bool:
    """Return whether an output's artifacts were made of the earlier listing, or of part of it before images were added.

    listing: the present reading of the same images; None if it refuses them.
    """
    if listing is not None and listing.digest == earlier.digest:
        return False
    earlier_images = replace(images, reading="earlier")
    if recorded & _training_digests(earlier_images, earlier):
        return True
    if not storage.exists(storage.join(latents, MANIFEST)):
        return False
    dataset = LatentDataset.open(latents)
    if listing is None or listing.class_names != earlier.class_names:
        earlier_names = {each.class_names for each in _in_each_order(earlier_images, earlier)}
        return dataset.class_names in earlier_names - {each.class_names for each in _in_each_order(images, listing)}
    keys = recorded_keys(dataset)
    return keys.issubset(earlier.keys) and not keys.issubset(listing.keys)
