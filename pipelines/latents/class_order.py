"""The order of a recipe's classes: by value for numbers, but as recorded for an output that has other artifacts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.config.recipe import Recipe
from pipelines.images.labels import are_numbers
from pipelines.images.listing import Listing
from pipelines.images.open import open_source
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.latents.dataset import MANIFEST, LatentDataset


def list_images(config: Recipe) -> tuple[Recipe, Listing]:
    """List all images of a recipe, held-out ones included; also return the recipe, with images.class_order filled in.

    It is filled in only where class names are numbers in another order than by value, or with numbers that no image
    has, and where the output holds nothing in the earlier order. Everywhere else recipe, classes and digests are what
    they were before there was a choice.
    """
    images = config.images
    listing = open_source(images).listing()
    if images.class_order is not None or images.class_names or not _may_differ(listing):
        return config, listing
    numeric = replace(images, class_order="numeric")
    other = open_source(numeric).listing()
    # Equal if the data set itself records the order of its classes.
    if other.digest == listing.digest or _holds(config, listing, other):
        return config, listing
    return replace(config, images=numeric), other


def with_recorded_class_order(config: Recipe, recorded: Mapping[str, Any] | None) -> Recipe:
    """Return the recipe with the order of classes that an artifact's recipe records, unless it has one of its own."""
    order = (recorded or {}).get("images", {}).get("class_order")
    if order is None or config.images.class_order is not None or config.images.class_names:
        return config
    return replace(config, images=replace(config.images, class_order=order))


def _may_differ(listing: Listing) -> bool:
    names = listing.class_names
    return are_numbers(names) and (bool(listing.empty_classes) or [*names] != sorted(names, key=int))


def _holds(config: Recipe, listing: Listing, other: Listing) -> bool:
    """Return whether the output holds latents or an autoencoder with the classes of `listing`, not those of `other`."""
    if storage.exists(storage.join(config.latents, MANIFEST)):
        recorded = LatentDataset.open(config.latents).class_names
        return recorded == listing.class_names != other.class_names
    digest = listing.split(config.images.held_out)[0].digest
    for stage, folder in (("encode", config.latents), ("autoencoder", config.folder(TRAINED_AUTOENCODER))):
        identity = Artifact(stage, folder, {}).recorded() or {}
        if identity.get("images", {}).get("digest") == digest:
            return True
    return False
