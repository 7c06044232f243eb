"""The distance of each class in a report: from the labels of samples and of the reference's images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster import storage
from evaluation.per_class import ClassDistance, measure_classes
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.scoring.records import LoadedFeatures
from pipelines.scoring.references import RealImages
from pipelines.scoring.settings import ScoringSettings
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
    real: RealImages,
    classes: SampleClasses,
) -> EvaluationReport:
    """Return a report with the distance of each class.

    real: the labels of the reference's images are looked up in its training images.
    """
    features, labels = scored.features.features, classes.labels if classes.labels is not None else scored.labels
    assert labels is not None, "require_classes_for_distances was called"
    training = real.training
    labels_by_key = dict(zip(training.keys, training.labels.tolist(), strict=True))
    if not _are_labels_known(reference, labels_by_key, real.settings):
        reason = "the reference does not say which images of which class it holds"
        counts = np.bincount(labels, minlength=len(classes.names))
        distances = [
            ClassDistance(name=name, num_samples=int(count), num_real=0, reason=reason)
            for name, count in zip(classes.names, counts, strict=False)
        ]
        return replace(report, per_class=distances)
    assert reference.features is not None and reference.keys is not None, "otherwise no labels are known"
    positions = {name: position for position, name in enumerate(classes.names)}
    # Classes are matched by name: a checkpoint may have them in another order than today's images.
    to_samples = [positions.get(name, -1) for name in training.class_names] or [-1]
    found = [labels_by_key.get(key) for key in reference.keys.tolist()]
    real_labels = np.array([-1 if label is None else to_samples[label] for label in found])
    return replace(report, per_class=measure_classes(features, labels, reference.features, real_labels, classes.names))


def _are_labels_known(
    reference: ReferenceStatistics, labels_by_key: Mapping[str, int], settings: ScoringSettings
) -> bool:
    """Return whether the images of a reference are those of some labels, of which it may hold others besides.

    A given reference that says that it is of other images often has some of the same names, such as 0001.png. It is
    taken for the same images at another path only where all of its names are known.
    """
    if reference.features is None or reference.keys is None:
        return False
    found = [key in labels_by_key for key in reference.keys.tolist()]
    path = settings.images.path
    is_other = bool(reference.source) and storage.absolute(reference.source) != storage.absolute(path)
    return all(found) if settings.reference is not None and is_other else any(found)
