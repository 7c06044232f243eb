"""Pictures of a report: samples, a row of them for each class, and the training images nearest to samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaluation.neighbours import find_nearest
from evaluation.reference import ReferenceStatistics
from pipelines.config.recipe import ImagesConfig
from pipelines.images.grids import class_grid, encode_png, labelled_grid

NUM_SAMPLES = 64
"""Images in the picture of samples."""
NUM_PER_CLASS = 10
"""Images of each class, of at most 20 classes."""
NUM_SUSPECTS = 8
"""Samples whose neighbours are shown: those nearest to a training image, because a copy would be among them."""
NUM_NEIGHBOURS = 5


def report_pictures(
    images: np.ndarray,
    labels: np.ndarray,
    features: np.ndarray,
    class_names: Sequence[str],
    neighbours: "Neighbours",
    numbers: Sequence[int] | np.ndarray | None = None,
) -> dict[str, bytes]:
    """Draw the pictures of a report; return PNG files by the names that the page knows.

    images: uint8 (M, H, W, 3), the first M of N samples. labels: (N,). features: (N, D). numbers: (M,), those of images
    that are not the first ones, by which they are named.
    """
    labels, features = labels[: len(images)], features[: len(images)]
    pictures = {"samples": encode_png(class_grid(images[:NUM_SAMPLES], labels[:NUM_SAMPLES], ()))}
    if class_names:
        pictures["classes"] = encode_png(class_grid(images, labels, class_names, columns=NUM_PER_CLASS))
    if rows := neighbours.rows(images, features, range(len(images)) if numbers is None else numbers):
        pictures["neighbours"] = encode_png(labelled_grid(rows))
    return pictures


class Neighbours:
    """The training images whose features a reference holds, found by their keys."""

    def __init__(self, reference: ReferenceStatistics, images: ImagesConfig):
        """images: those of the recipe, in which the reference's keys are looked up."""
        self.reference, self.images = reference, images

    @property
    def are_known(self) -> bool:
        """Whether the reference records the keys of its images, and those are the recipe's images."""
        known = self.reference.keys is not None and len(self.reference.keys) >= NUM_NEIGHBOURS
        return known and self.reference.source == self.images.path

    def rows(
        self, images: np.ndarray, features: np.ndarray, numbers: Sequence[int] | np.ndarray
    ) -> list[tuple[str, np.ndarray]]:
        """Return rows for a grid: a sample, then the training images nearest to it; no rows if they are unknown.

        numbers: those by which rows name the samples.
        """
        from pipelines.images.preprocess import read_cropped

        if not self.are_known:
            return []
        reference = self.reference
        assert reference.features is not None and reference.keys is not None, "are_known says so"
        found, distances = find_nearest(features, reference.features, NUM_NEIGHBOURS)
        suspects = np.argsort(distances[:, 0], kind="stable")[:NUM_SUSPECTS]
        keys = [str(key) for key in reference.keys[found[suspects].ravel()]]
        size = images.shape[1]
        real, good, _ = read_cropped(replace(self.images, size=size), keys)
        if len(good) < len(keys):  # some images are gone since the reference was built
            return []
        real = real.reshape(len(suspects), NUM_NEIGHBOURS, size, size, 3)
        return [
            (f"#{numbers[sample]}  d {distances[sample, 0]:.3g}", np.concatenate([images[sample : sample + 1], nearby]))
            for sample, nearby in zip(suspects, real, strict=True)
        ]
