"""The distance of each class in a report: from the labels of samples and of the reference's images."""

from dataclasses import dataclass, replace

import numpy as np

from evaluation.per_class import ClassDistance, measure_classes
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.images.listing import Listing
from pipelines.scoring.records import LoadedFeatures
from raydit.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class SampleClasses:
    """The classes of the images that are scored."""

    names: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    """(N,), of images from elsewhere; None: samples, whose records hold their labels."""


def require_classes_for_distances(names: tuple[str, ...], what: str) -> None:
    """Raise InvalidInput before any work if images without classes are to have a distance for each class."""
    if not names:
        raise InvalidInput(
            f"evaluate.per_class: found true, and {what} has no classes", "classes", "remove evaluate.per_class"
        )


def with_class_distances(
    report: EvaluationReport,
    scored: LoadedFeatures,
    reference: ReferenceStatistics,
    training: Listing,
    classes: SampleClasses,
) -> EvaluationReport:
    """Return a report with the distance of each class.

    training: the images that a reference without an own file is of; the labels of its images are looked up there.
    """
    features, labels = scored.features.features, classes.labels if classes.labels is not None else scored.labels
    assert labels is not None, "require_classes_for_distances was called"
    labels_by_key = dict(zip(training.keys, training.labels.tolist(), strict=True))
    known = reference.features is not None and reference.keys is not None
    if not known or not any(key in labels_by_key for key in reference.keys.tolist()):  # type: ignore[union-attr]
        reason = "the reference does not say which images of which class it holds"
        counts = np.bincount(labels, minlength=len(classes.names))
        distances = [
            ClassDistance(name=name, num_samples=int(count), num_real=0, reason=reason)
            for name, count in zip(classes.names, counts, strict=False)
        ]
        return replace(report, per_class=distances)
    assert reference.features is not None and reference.keys is not None, "known says so"
    positions = {name: position for position, name in enumerate(classes.names)}
    # Classes are matched by name: a checkpoint may have them in another order than today's images.
    to_samples = [positions.get(name, -1) for name in training.class_names] or [-1]
    found = [labels_by_key.get(key) for key in reference.keys.tolist()]
    real_labels = np.array([-1 if label is None else to_samples[label] for label in found])
    return replace(report, per_class=measure_classes(features, labels, reference.features, real_labels, classes.names))
