"""Images of some classes of a source (images.classes), numbered among themselves."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipelines.images.listing import ImageSource, Listing, Locations, shorten_list
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ClassSubset:
    """The images of some classes of a source."""

    source: ImageSource
    classes: tuple[str, ...]

    def listing(self) -> Listing:
        """List the images of these classes. Raises InvalidInput as `take_classes`."""
        return take_classes(self.source.listing(), self.classes)

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        """Yield the image of each key, in order; see `ImageSource.read`."""
        return self.source.read(keys, locations)


def take_classes(listing: Listing, classes: Sequence[str]) -> Listing:
    """Return the images of some classes, whose numbers count from 0 in the listing's order of classes.

    Raises InvalidInput if the images have no classes, or none of a given name.
    """
    if not listing.class_names:
        looked = f", which have the columns {shorten_list(listing.columns)}" if listing.columns else ""
        raise InvalidInput(
            f"images.classes: found {shorten_list(classes)} for images without classes{looked}",
            "images with classes",
            "remove images.classes, or set images.label_column to the column of labels",
        )
    for name in classes:
        if name not in listing.class_names:
            close = difflib.get_close_matches(name, listing.class_names, n=1)
            raise InvalidInput(
                f"images.classes: found {name!r}" + (f' (did you mean "{close[0]}"?)' if close else ""),
                f"names of classes: {shorten_list(listing.class_names)}",
                "correct images.classes",
            )
    wanted = set(classes)
    names = tuple(name for name in listing.class_names if name in wanted)
    return take_named(listing, names)


def take_named(listing: Listing, names: Sequence[str]) -> Listing:
    """Return the images whose classes are among `names`, whose positions become the numbers of the classes."""
    number = {name: position for position, name in enumerate(names)}
    numbers = np.array([number.get(name, -1) for name in listing.class_names], np.int32)
    labels = numbers[listing.labels]
    return replace(listing, labels=labels, class_names=tuple(names)).take(labels >= 0)
