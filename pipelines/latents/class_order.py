"""The order of a recipe's classes: numeric for class names that are numbers, unless the output has artifacts in another
order, which is then kept."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster import storage
from pipelines.artifacts import Artifact
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.labels import are_numbers
from pipelines.images.listing import Listing
from pipelines.images.open import open_source
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.latents.dataset import MANIFEST, LatentDataset


def with_class_order(config: Recipe, listing: Listing) -> tuple[Recipe, Listing]:
    """Return the recipe with images.class_order filled in, and its listing in this order.

    It is filled in only where class names are numbers in another order than by value, or with numbers that no image
    has, and where the output holds nothing in the earlier order; images that are read as in an earlier release keep its
    order unless the output holds the other. Everywhere else recipe, classes and digests are what they were before there
    was a choice. listing: all images of the recipe.
    """
    numeric = in_numeric_order(config.images, listing)
    if numeric is None:
        return config, listing
    if config.images.reading == "earlier":
        keeps = not _holds(config, numeric, listing)
    else:
        keeps = _holds(config, listing, numeric)
    if keeps:
        return config, listing
    return replace(config, images=replace(config.images, class_order="numeric")), numeric


def in_numeric_order(images: ImagesConfig, listing: Listing) -> Listing | None:
    """Return a listing with its classes in numeric order; None if that is the same, or if the recipe says the order."""
    if images.class_order is not None or images.class_names or not _may_differ(listing):
        return None
    numeric = open_source(replace(images, class_order="numeric")).listing()
    # Equal if the data set itself records the order of its classes.
    return None if numeric.digest == listing.digest else numeric


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
    return digest in recorded_digests(config.latents, storage.absolute(config.output))


def recorded_digests(latents: str, output: str) -> set[str]:
    """Return the digests of the listings that an output's latents and autoencoder were made of, as they record them."""
    folders = {"encode": latents, "autoencoder": storage.join(output, TRAINED_AUTOENCODER)}
    identities = (Artifact(stage, folder, {}).recorded() or {} for stage, folder in folders.items())
    return {digest for identity in identities if (digest := identity.get("images", {}).get("digest"))}
