"""The pictures of a report: samples, a row for each class, and what of the training images comes nearest to samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaluation.neighbours import nearest
from evaluation.reference import ReferenceStatistics
from pipelines.config.recipe import ImagesConfig
from pipelines.images.grids import class_grid, labelled_grid, png_of

SAMPLES = 64
CLASSES = 10
"""Images of each class, of at most 20 classes."""
SUSPECTS = 8
"""Samples whose neighbours are shown: those that lie nearest to a training image, where a copy would be."""
NEIGHBOURS = 5


def report_pictures(
    images: np.ndarray, labels: np.ndarray, features: np.ndarray, class_names: Sequence[str], neighbours: "Neighbours"
) -> dict[str, bytes]:
    """PNG files by their names on the page.

    images: uint8 (M, H, W, 3) of the first of N samples. labels: (N,), features: (N, D), of all.
    """
    labels, features = labels[: len(images)], features[: len(images)]
    pictures = {"samples": png_of(class_grid(images[:SAMPLES], labels[:SAMPLES], ()))}
    if class_names:
        pictures["classes"] = png_of(class_grid(images, labels, class_names, columns=CLASSES))
    if rows := neighbours.rows(images, features):
        pictures["neighbours"] = png_of(labelled_grid(rows))
    return pictures


class Neighbours:
    """The training images behind a reference's features, found by their keys."""

    def __init__(self, reference: ReferenceStatistics, images: ImagesConfig):
        self.reference, self.images = reference, images

    @property
    def are_known(self) -> bool:
        """Whether the reference says of which images its features are, and they are the recipe's."""
        known = self.reference.keys is not None and len(self.reference.keys) >= NEIGHBOURS
        return known and self.reference.source == self.images.path

    def rows(self, images: np.ndarray, features: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Rows for a grid: a sample, then the training images nearest to it; nothing where they are not known."""
        from pipelines.images.preprocess import read_cropped

        if not self.are_known:
            return []
        reference = self.reference
        assert reference.features is not None and reference.keys is not None, "are_known says so"
        found, distances = nearest(features, reference.features, NEIGHBOURS)
        suspects = np.argsort(distances[:, 0], kind="stable")[:SUSPECTS]
        keys = [str(key) for key in reference.keys[found[suspects].ravel()]]
        size = images.shape[1]
        real, good, _ = read_cropped(replace(self.images, size=size), keys)
        if len(good) < len(keys):  # images that were there when the reference was built
            return []
        real = real.reshape(len(suspects), NEIGHBOURS, size, size, 3)
        return [
            (f"#{sample}  d {distances[sample, 0]:.3g}", np.concatenate([images[sample : sample + 1], nearby]))
            for sample, nearby in zip(suspects, real, strict=True)
        ]
