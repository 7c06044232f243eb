"""The distance of each class in a report: from the labels of samples and of the reference's images."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster import storage
from evaluation.per_class import ClassDistance, measure_classes
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.images.listing import shorten_list
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.samples.saved_samples import name_class_folder, name_in_folder
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.records import LoadedFeatures
from raydit.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class SampleClasses:
    """The classes of the images that are scored."""

    names: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    """(N,), of images from elsewhere; None: samples, whose records hold their labels."""


def check_class_distances(settings: ScoringSettings, names: Sequence[str], what: str) -> None:
    """Raise InvalidInput before any work if each class is to have a distance, and none can have one.

    names: classes of the images that are scored, of which there are none, or none of the real images' classes. what:
    where these images are from.
    """
    if not settings.evaluate.per_class:
        return
    if not names:
        raise InvalidInput(
            f"evaluate.per_class: found true, and {what} has no classes", "classes", "remove evaluate.per_class"
        )
    known = RealImages.of(settings).training.class_names
    if known and max(match_classes(names, known)) < 0:
        raise InvalidInput(
            f"evaluate.per_class: found true, and none of the classes of {what} ({shorten_list(names, 3)}) among those "
            f"of the real images ({shorten_list(known, 3)})",
            "classes of the same names",
            "name the classes as those of the real images, or remove evaluate.per_class",
        )


def match_classes(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return for each known class the position of its name, or -1.

    A checkpoint may have the classes in another order than today's images, so names decide. Samples that raydit saved
    have either the folders of SavedSamples, or in .npz files the numbers of all classes, which count in order.
    """
    positions = {name: position for position, name in enumerate(names)}
    if positions.keys() & set(known):
        return [positions.get(name, -1) for name in known]
    numbers = {int(name): position for name, position in positions.items() if name.isascii() and name.isdigit()}
    if len(numbers) == len(names) and numbers.keys() == set(range(len(known))):
        return [numbers[label] for label in range(len(known))]
    folders = {name: re.fullmatch(r"(\d{4,})-(.*)", name) for name in positions}
    by_folder = {match[2]: positions[name] for name, match in folders.items() if match}
    exact = [positions.get(name_class_folder(label, known), -1) for label in range(len(known))]
    stems = [name_in_folder(name) for name in known]
    unique = {stem for stem, count in Counter(stems).items() if count == 1}
    # Of classes whose names differ in special characters alone, the number in the folder's name decides.
    return [
        by_folder.get(stem, position) if stem in unique else position
        for stem, position in zip(stems, exact, strict=True)
    ]


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
    assert labels is not None, "check_class_distances was called"
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
    to_samples = match_classes(classes.names, training.class_names) or [-1]
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
