"""The data set that raydit's dependencies bring along: scikit-learn's handwritten digits."""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.images.listing import Listing, Locations, shorten_list
from pipelines.images.splits import refuse_absent_split
from pipelines.images.unused_settings import note_unused
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config.recipe import ImagesConfig


DIGITS = tuple("0123456789")


class DigitsSource:
    """The 1,797 handwritten digits (8x8, 17 grey levels) of Alpaydin & Kaynak 1998 that scikit-learn ships."""

    def __init__(self, config: "ImagesConfig"):
        self.config = config

    def listing(self) -> Listing:
        refuse_absent_split(self.config, "digits")
        labels = _load_digits()[1]
        keys = [f"digits#{index:04d}" for index in range(len(labels))]
        notes = note_unused(self.config, "scikit-learn's digits")
        return Listing(keys, labels, np.zeros(len(labels), np.int64), self._class_names(), notes=notes)

    def _class_names(self) -> tuple[str, ...]:
        """Return images.class_names, or else the digits; an output of an earlier release has the digits in any case."""
        given = tuple(self.config.class_names)
        if not given or self.config.reading is not None:
            return DIGITS
        if len(given) != len(DIGITS) or len({*given}) != len(DIGITS):
            raise InvalidInput(
                f"images.class_names: found {shorten_list(given)} for scikit-learn's digits",
                "10 different names, from that of 0 to that of 9",
                "correct or remove images.class_names",
            )
        return given

    def read(self, keys: Sequence[str], locations: Locations | None = None) -> "Iterator[Image.Image | Exception]":
        from PIL import Image

        images = _load_digits()[0]
        for key in keys:
            yield Image.fromarray(images[int(key.partition("#")[2])])


@lru_cache(maxsize=1)
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (1797, 8, 8) and labels int32 (1797,)."""
    # The file that sklearn.datasets.load_digits reads; importing scikit-learn takes two seconds in every worker.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None, "scikit-learn is a dependency of raydit"
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return images, table[:, -1].astype(np.int32)
