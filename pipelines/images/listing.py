"""Listings of images and the protocol of image sources.

A source lists first and reads later, so that a plan is made before any pixel is decoded, and each worker reads only
its share. A key names an image within its source, and is all that is needed to read it again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipelines.console import counted
from pipelines.images.alike_classes import note_alike_classes
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

MAX_CLASS_NAME = 1000
"""Most characters of the name of a class, which tables, pages and pictures show."""

Locations = np.ndarray | Sequence[Sequence[int]]
"""Two integers for each image by which its source finds it without a search (see `Listing.locations`)."""


@dataclass(frozen=True)
class Listing:
    """All images of a source in their stable order, before any is decoded."""

    keys: list[str]
    """Names of the images within the source; each occurs once."""
    labels: np.ndarray
    """int32 (N,): class numbers; all 0 if there are no classes."""
    stamps: np.ndarray
    """int64 (N,): a number for each image that changes when the image is replaced. File times are never used.

    Files: their length, so that a replacement of equal length goes unnoticed. Parquet: a hash of the file's length
    and footer, which holds the length of every column chunk. Tar shards: a hash of the member's header (name,
    length, time and owner in the archive). Arrow files: length of the image's bytes. Digits: 0.
    """
    class_names: tuple[str, ...]
    """Names of the classes in the order of their numbers; empty if there are no classes."""
    locations: np.ndarray | None = None
    """int64 (N, 2), or None if the source finds images by their keys alone.

    Tar shards: offset and length of the image's bytes. Arrow files: offset of the record batch, and the row in it.
    """
    notes: tuple[str, ...] = ()
    """Notices for the user about how the images were found, as sentences; not part of the digest."""
    columns: tuple[str, ...] = ()
    """Columns, fields or suffixes in which a label was looked for, if there are no classes; no part of the digest."""
    image_column: str = ""
    """images.image_column, where it chooses among several columns of images and the digest does not say so: other
    artifacts than before would follow from a digest that does."""
    root: str | None = None
    """Path or URI that keys are relative to, for images in files; no part of the digest."""

    def __post_init__(self) -> None:
        longest = max(self.class_names, key=len, default="")
        if len(longest) > MAX_CLASS_NAME:
            raise InvalidInput(
                f"images.path: found a class name of {len(longest):,} characters, {longest[:60]!r}...",
                f"at most {MAX_CLASS_NAME}",
                "correct the labels, or set images.label_column to the column of the classes",
            )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def digest(self) -> str:
        """sha256 of keys, class names, labels and stamps: changes when images are added, removed or replaced.

        It does not depend on where the images are stored, or on when they were copied.
        """
        digest = hashlib.sha256(json.dumps([self.keys, self.class_names]).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update(self.stamps.astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, held_out: float) -> tuple["Listing", "Listing"]:
        """Split into training and held-out images. held_out: share of the latter.

        The side of an image depends on its key alone, so that added images never move others.
        """
        chosen = np.array([falls_into_share(key, held_out) for key in self.keys], dtype=bool)
        return self.take(~chosen), self.take(chosen)

    @property
    def column_identity(self) -> dict[str, str]:
        """What an identity has to record beside the digest: the column of images, where the digest does not say it."""
        return {"image_column": self.image_column} if self.image_column else {}

    def take(self, which: np.ndarray | Sequence[int]) -> "Listing":
        """Return the listing of the images at some positions, or where a mask (bool (N,)) is true."""
        which = np.asarray(which)
        positions = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        keys = [self.keys[position] for position in positions]
        locations = None if self.locations is None else self.locations[positions]
        return replace(
            self, keys=keys, labels=self.labels[positions], stamps=self.stamps[positions], locations=locations
        )

    @cached_property
    def empty_classes(self) -> list[str]:
        """Names of the classes that no image has."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return [name for name, count in zip(self.class_names, counts, strict=False) if not count]

    def describe_classes(self) -> list[str]:
        """Return what a user should know about the classes before images are encoded, in sentences."""
        notes = [*self.notes, *note_alike_classes(self.class_names)]
        empty = self.empty_classes
        if not empty:
            return notes
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        note = (
            f"{len(empty)} of {len(self.class_names)} classes have no images to train on ({shown}): the model "
            "cannot learn them, but evaluations still draw samples of them"
        )
        return [*notes, note]

    def summary(self) -> str:
        """Return how many images and classes there are, such as "1,797 images in 10 classes"."""
        looked = f" (no label among {shorten_list(self.columns)})" if self.columns else ""
        return summarize_images(len(self), len(self.class_names)) + looked


def summarize_images(count: int, num_classes: int) -> str:
    """Return numbers of images and classes in words."""
    classes = f"in {num_classes:,} class{'es' * (num_classes > 1)}" if num_classes else "without classes"
    return f"{counted(count, 'image')} {classes}"


def shorten_list(names: Sequence[str], most: int = 10) -> str:
    """Return names separated by commas, of which only the first are shown."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def falls_into_share(key: str, share: float) -> bool:
    """Return whether an image is among a share of images that are held out. A larger share holds it out, too."""
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64  # in [0, 1), uniform
    return fraction < share


def make_stamp(*parts: bytes) -> int:
    """Return a signed 64-bit hash of some bytes, for `Listing.stamps`."""
    digest = hashlib.sha256(b"".join(parts)).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class ImageSource(Protocol):
    """A data set of images that can be listed and read by keys."""

    def listing(self) -> Listing:
        """List all images, in an order that does not change from call to call."""
        ...

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        """Yield the image of each key, in order; an exception instead of an image that cannot be used.

        locations: those of the keys in the listing, if it has any; without them the source searches. Errors of the
        network or the disk are raised instead of yielded, because the image may be intact.
        """
        ...
