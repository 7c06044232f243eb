"""The labels of a reference's images are looked up where its images are, and in no others of the same names."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_recipe

from evaluation.extractors import Features
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines.scoring.class_distances import SampleClasses, with_class_distances
from pipelines.scoring.references import RealImages
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
