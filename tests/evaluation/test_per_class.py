"""The distance of each class, against the functions of whole sets."""

import numpy as np

from evaluation.metrics import frechet_distance, kernel_distance
from evaluation.per_class import MIN_IMAGES, ClassDistance, measure_classes


def test_each_class_has_the_distance_that_its_images_allow():
    """Of two dimensions a Frechet distance needs five images, but no class with fewer than ten is measured."""
    rng = np.random.default_rng(0)
    samples, real = rng.normal(size=(300, 6)), rng.normal(0.5, 1, size=(250, 6))
    labels = np.repeat([0, 1, 2, 3], [100, 12, 9, 179])
    real_labels = np.repeat([0, 1, 2, -1], [40, 150, 20, 40])  # of -1 the samples have no class
    many, few, none, absent = measure_classes(samples, labels, real, real_labels, ("many", "few", "none", "absent"))
    one, other = samples[labels == 0], real[real_labels == 0]
    expected = frechet_distance(one.mean(axis=0), np.cov(one.T), other.mean(axis=0), np.cov(other.T))
    assert (many.name, many.metric, many.num_samples, many.num_real) == ("many", "fd", 100, 40)
    np.testing.assert_allclose(many.value, expected, rtol=1e-9)
    one, other = samples[labels == 1], real[real_labels == 1]
    expected, _ = kernel_distance(one, other, subset_size=12)
    assert (few.metric, few.value, few.num_samples) == ("kid", expected, 12)
    assert none == ClassDistance(
        name="none", num_samples=9, num_real=20, reason=f"9 samples, and at least {MIN_IMAGES} are needed"
    )
    assert absent.value is None and absent.reason.startswith("0 real images with features, and at least")


def test_the_reason_counts_the_side_that_is_too_few():
    for num_samples, num_real, few in (
        (8, 3, "8 samples"),
        (3, 8, "3 samples"),
        (12, 3, "3 real images with features"),
    ):
        sides = np.zeros((num_samples, 2)), np.zeros((num_real, 2))
        labels = (np.zeros(len(side), int) for side in sides)
        (found,) = measure_classes(sides[0], next(labels), sides[1], next(labels), ("one",))
        assert found.reason == f"{few}, and at least {MIN_IMAGES} are needed"
