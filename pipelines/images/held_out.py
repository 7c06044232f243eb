"""The held-out images of a recipe: a share of its images, or images of their own (images.validation)."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from pipelines.images.listing import Listing, shorten_list
from pipelines.images.open import open_source
from pipelines.images.preprocess import read_cropped
from pipelines.images.splits import ALL_SPLITS, IS_DEFAULT, canonical_split
from pipelines.images.subset import take_named
from pipelines.images.validation import held_out_source, names_split
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from pipelines.config.recipe import ImagesConfig

NUM_COMPARED = 8
"""Images that are compared pixel by pixel where all names and lengths of held-out and training images are equal."""
NOT_TRAINED_ON = "images that nothing trains on"
OTHER_IMAGES = "name another split, or the path, URI or hub id of other images, or set images.held_out instead"


def split_images(images: "ImagesConfig", listing: Listing) -> tuple[Listing, Listing]:
    """Return the training images and the held-out images, both with the classes of `listing`.

    listing: all images of images.path. Keys of held-out images are read by `held_out_source`. Raises InvalidInput or
    NotFound if images.validation names no images, the training images, or images of other classes.
    """
    if images.validation is None:
        return listing.split(images.held_out)
    return listing, _list_validation(images, listing)


def _list_validation(images: "ImagesConfig", training: Listing) -> Listing:
    source, validation = held_out_source(images), images.validation
    assert validation is not None, "the caller has looked"
    if _names_training_images(images, source):
        raise _same_images(validation)
    try:
        listing = open_source(source).listing()
    except (InvalidInput, NotFound) as error:
        raise type(error)(*(_name_field(part) for part in (error.found, error.expected, error.do))) from error
    held_out = with_classes_of(training, listing, images.classes)
    if not len(held_out):
        raise InvalidInput(
            f"images.validation: found no images in {validation!r}", "held-out images", "correct images.validation"
        )
    common = _find_common(training, held_out)
    if len(common) == len(training) == len(held_out) or _is_copy(images, training, held_out):
        raise _same_images(validation)
    if common:
        raise InvalidInput(
            f"images.validation: found {validation!r}, of whose {len(held_out):,} images {len(common):,} are trained "
            f"on, such as {common[0]}",
            NOT_TRAINED_ON,
            OTHER_IMAGES,
        )
    return held_out


def _is_copy(images: "ImagesConfig", training: Listing, held_out: Listing) -> bool:
    """Return whether held-out images are the training images, by their keys, stamps and some of their pixels.

    Files of uncompressed images are all equally long, and often have the same names in the folders of two splits.
    """
    by_split = names_split(images.validation or "")
    if by_split and training.root is not None and training.root != held_out.root:
        return False
    if held_out.keys != training.keys or not np.array_equal(held_out.stamps, training.stamps):
        return False
    count = min(len(held_out), NUM_COMPARED)
    chosen = held_out.take(np.arange(count) * len(held_out) // count)
    equal, readable = find_equal_images(images, training, chosen)
    return len(equal) == readable


def find_equal_images(images: "ImagesConfig", training: Listing, held_out: Listing) -> tuple[list[str], int]:
    """Return the keys of those held-out images whose pixels are those of the training image of the same key.

    Also returns the number of images that could be read on both sides. held_out: images whose keys training images
    have as well.
    """
    positions = {key: position for position, key in enumerate(training.keys)}
    same = training.take([positions[key] for key in held_out.keys])
    sides = []
    for source, listing in ((held_out_source(images), held_out), (images, same)):
        pixels, good, _ = read_cropped(source, listing.keys, listing.locations)
        sides.append({listing.keys[position]: image for position, image in zip(good, pixels, strict=True)})
    readable = [key for key in sides[0] if key in sides[1]]
    return [key for key in readable if np.array_equal(sides[0][key], sides[1][key])], len(readable)


def _find_common(training: Listing, held_out: Listing) -> list[str]:
    """Return the keys of held-out images that are trained on, by their files' names; copies are not found.

    Equal keys alone mean nothing: they are relative to folders that may differ.
    """
    if training.root is None or held_out.root is None:
        return []
    ours, theirs = _folder_parts(training.root), _folder_parts(held_out.root)
    shared = min(len(ours), len(theirs))
    if ours[:shared] != theirs[:shared]:
        return []  # neither folder lies in the other
    below_theirs, below_ours = "".join(ours[shared:]), "".join(theirs[shared:])
    trained_on = {below_theirs + key for key in training.keys}
    return [key for key in held_out.keys if below_ours + key in trained_on]


def _folder_parts(root: str) -> list[str]:
    """Return the folders of a path or URI, each with a slash; links are followed."""
    path = os.path.realpath(storage.local_path(root)) if storage.is_local(root) else root.partition("?")[0]
    return [f"{part}/" for part in path.rstrip("/").split("/")]


def _names_training_images(images: "ImagesConfig", source: "ImagesConfig") -> bool:
    """Return whether the source of held-out images is, by its name alone, that of the training images."""
    if names_split(images.validation or ""):
        splits = {canonical_split(images.split), canonical_split(source.split)}
        return len(splits) == 1 or ALL_SPLITS in splits
    return storage.absolute(source.path) == storage.absolute(images.path)


def _same_images(validation: str) -> InvalidInput:
    return InvalidInput(
        f"images.validation: found {validation!r}, which names the training images", NOT_TRAINED_ON, OTHER_IMAGES
    )


def _name_field(text: str) -> str:
    """Return a part of a source's error with the field that named the source."""
    for field in ("images.path", "images.split", "images.format"):
        text = text.replace(field, "images.validation")
    text = text.replace(IS_DEFAULT, "")  # of images.split alone
    return text.replace(f', or to "{ALL_SPLITS}"', "")  # all images, of which some are trained on


def with_classes_of(training: Listing, held_out: Listing, classes: Sequence[str] = ()) -> Listing:
    """Return held-out images with the classes of the training images, matched by name.

    classes: images.classes; where it is set, images of other classes are left out. Raises InvalidInput for images
    without classes, or of a class that the training images do not have.
    """
    if not training.class_names:
        return replace(held_out, labels=np.zeros(len(held_out), np.int32), class_names=())
    if not held_out.class_names:
        raise InvalidInput(
            f"images.validation: found images without classes beside training images in {len(training.class_names)} "
            "classes",
            "the same classes",
            "sort them into folders of the same names, or give them the same column of labels",
        )
    occurring = {held_out.class_names[label] for label in np.unique(held_out.labels)}
    unknown = sorted(occurring - set(training.class_names))
    if unknown and not classes:
        raise InvalidInput(
            f"images.validation: found the class {unknown[0]!r}",
            f"classes of the training images: {shorten_list(training.class_names)}",
            "correct the labels, or choose the classes of both by images.classes",
        )
    return take_named(held_out, training.class_names)
