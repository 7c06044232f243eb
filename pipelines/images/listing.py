"""What a source says of its images before it reads any."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Listing:
    """All images of a source in their stable order, before any is decoded."""

    keys: list[str]
    labels: np.ndarray
    """int32, one for each key; 0 throughout where there are no classes."""
    stamps: np.ndarray
    """int64, one for each key: another number when its image is replaced. Never taken from the file system's clock.

    Files: their length, so that a replacement of equal length goes unnoticed. Parquet: a hash of the file's length
    and footer, which holds the length of every column chunk. Tar shards: a hash of the member's header (name,
    length, time and owner in the archive). Arrow files: length of the image's bytes. Digits: 0.
    """
    class_names: tuple[str, ...]
    """Empty for images without classes."""
    places: np.ndarray | None = None
    """int64 (N, 2), from sources that would have to search for an image: hand them to `read` with the keys."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def digest(self) -> str:
        """sha256 over keys, class names, labels and stamps: changes when images come, go or are replaced.

        The same wherever the images lie and whenever they were copied.
        """
        digest = hashlib.sha256(json.dumps([self.keys, self.class_names]).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update(self.stamps.astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, held_out: float) -> tuple["Listing", "Listing"]:
        """Training and held-out images. An image's side depends on its key alone, so growth moves none."""
        aside = np.array([_hash_fraction(key) < held_out for key in self.keys], dtype=bool)
        return self.take(~aside), self.take(aside)

    def take(self, which: np.ndarray | Sequence[int]) -> "Listing":
        """The images at some positions, or where a mask is true."""
        positions = np.arange(len(self))[np.asarray(which)] if len(which) else np.zeros(0, np.int64)
        keys = [self.keys[position] for position in positions]
        places = None if self.places is None else self.places[positions]
        return Listing(keys, self.labels[positions], self.stamps[positions], self.class_names, places)


def _hash_fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def stamp_of(*parts: bytes) -> int:
    """A signed 64-bit number that stands for some bytes."""
    digest = hashlib.sha256(b"".join(parts)).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class ImageSource(Protocol):
    """What every source of images can do."""

    def listing(self) -> Listing:
        """All images, in an order that does not change from call to call."""
        ...

    def read(
        self, keys: Sequence[str], places: Sequence[Sequence[int]] | None = None
    ) -> Iterator["Image.Image | Exception"]:
        """The images of `keys`, in order; the reason in place of an image that cannot be used.

        places: those of the keys in the listing, where it has some; without them the source searches. An error of
        the network or the disk is raised, not handed back: the image may be fine.
        """
        ...
