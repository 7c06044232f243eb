"""The labels of a reference's images are looked up where its images are, and in no others of the same names."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_recipe

from evaluation.extractors import Features
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.scoring.class_distances import SampleClasses, match_classes, with_class_distances
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.samples.saved_samples import name_class_folder
from pipelines.scoring.settings import ScoringSettings

PROTOCOL = EvaluationProtocol(num_samples=30, decoder="d", extractor="e", extractor_sha256="s", reference_digest="r")
REPORT = EvaluationReport(protocol=PROTOCOL, checkpoint="c", checkpoint_digest="a", metrics={})


def has_distances(folder, source, keys, given=True):
    """Whether classes get a distance from a reference of images with some keys."""
    config = tiny_recipe(folder, "images.held_out=0", *(["evaluate.reference=given.npz"] if given else []))
    real = RealImages.of(ScoringSettings.from_recipe(config))
    known = real.training.keys[: len(real.training) - 1]
    keys = [*known, *keys]
    features = np.random.default_rng(0).normal(size=(len(keys), 2)).astype(np.float32)
    reference = ReferenceStatistics(
        n=len(keys),
        mu=np.zeros(2),
        sigma=np.eye(2),
        features=features,
        keys=np.array(keys),
        extractor="e",
        extractor_sha256="s",
        source=str(source),
    )
    scored = SimpleNamespace(features=Features(features[:30]), labels=np.arange(30) % 3)
    report = with_class_distances(REPORT, scored, reference, real, SampleClasses(real.training.class_names))
    found = [each.value is not None for each in report.per_class]
    assert all(found) or report.per_class[0].reason == "the reference does not say which images of which class it holds"
    return all(found)


@pytest.mark.parametrize(
    ("source", "keys", "given", "expected"),
    [
        ("images", ["new.png"], True, True),  # the same folder, from which an image was removed
        ("other", [], True, True),  # a copy of it
        ("other", ["new.png"], True, False),
        ("other", ["new.png"], False, True),  # the reference of the training images, which were moved
    ],
)
def test_a_given_reference_of_other_images_has_no_labels(tmp_path, source, keys, given, expected):
    assert has_distances(tmp_path, tmp_path / source, keys, given) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cat", "a b", "a/b", ""), [0, 1, 2, 3]),
        (("a/b", "cat"), [1, -1, 0, -1]),  # names decide, not positions
        (("cat", "0001"), [0, -1, -1, -1]),
        (("0000-cat", "0001-a-b", "0002-a-b", "0003"), [0, 1, 2, 3]),  # folders of saved samples
        (("0002-a-b", "0007-cat"), [1, -1, 0, -1]),  # of some classes, and in another order
        (("0", "1", "2", "3"), [0, 1, 2, 3]),  # labels in an .npz file
        (("0", "1", "2"), [-1, -1, -1, -1]),  # of other classes
        (("1", "2", "3", "4"), [-1, -1, -1, -1]),
        (("x", "y", "z", "0"), [-1, -1, -1, -1]),
    ],
)
def test_classes_of_images_are_found_by_name_or_as_raydit_saves_them(names, expected):
    assert match_classes(names, ("cat", "a b", "a/b", "")) == expected


@pytest.mark.parametrize("count", [3, 10_000, 10_001])
def test_folders_of_saved_samples_sort_as_labels_do_and_are_found_again(count):
    known = [f"class {label}" for label in range(count)]
    labels = sorted({*range(min(count, 2000)), count // 10, count - 2, count - 1})
    folders = [name_class_folder(label, known) for label in labels]
    assert folders == sorted(folders) and folders[0] == f"{'0' * (4 + (count > 10_000))}-class-0"
    found = match_classes(folders, known)
    assert [found[label] for label in labels] == list(range(len(labels)))


def test_saved_samples_have_a_distance_for_each_class(tmp_path):
    config = tiny_recipe(tmp_path, "images.held_out=0")
    real = RealImages.of(ScoringSettings.from_recipe(config))
    keys, names = real.training.keys, real.training.class_names
    features = np.random.default_rng(0).normal(size=(len(keys), 2)).astype(np.float32)
    moments = {"mu": np.zeros(2), "sigma": np.eye(2), "features": features, "keys": np.array(keys)}
    reference = ReferenceStatistics(n=len(keys), **moments, extractor="e", extractor_sha256="s")
    scored, labels = SimpleNamespace(features=Features(features[:30])), np.arange(30) % 3
    reports = [
        with_class_distances(REPORT, scored, reference, real, SampleClasses(tuple(given), labels)).per_class
        for given in (names, [name_class_folder(label, names) for label in range(3)], "012")
    ]
    values = [[(each.value, each.num_real) for each in report] for report in reports]
    assert values[0] == values[1] == values[2] and all(value is not None for value, _ in values[0])
