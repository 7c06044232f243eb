"""Scores carry their names, spreads and warnings."""

import numpy as np
import pytest

from evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from evaluation.reference import ReferenceStatistics
from evaluation.score import score


def features(n, seed, dim=16):
    return np.random.RandomState(seed).randn(n, dim).astype(np.float32)


def reference_of(real, extractor="efficientnet-lite0", **more):
    wide = real.astype(np.float64)
    return ReferenceStatistics(
        n=len(real),
        mu=wide.mean(axis=0),
        sigma=np.cov(wide, rowvar=False),
        extractor=extractor,
        extractor_sha256="ab",
        **more,
    )


def test_scores_are_those_of_the_metrics_under_their_names():
    generated, real, logits = features(300, 0) + 0.2, features(200, 1), features(300, 2, dim=10)
    found = score(generated, logits, reference_of(real, features=real), extractor="efficientnet-lite0")
    wide = generated.astype(np.float64)
    reference = reference_of(real)
    expected = {
        "fd": frechet_distance(wide.mean(axis=0), np.cov(wide, rowvar=False), reference.mu, reference.sigma),
        "is": inception_score(logits)[0],
        "kid": kernel_distance(generated, real, subset_size=200)[0],
        "precision": precision_recall(generated, real)[0],
        "recall": precision_recall(generated, real)[1],
    }
    assert found.metrics == pytest.approx({f"{k}_efficientnet_lite0_300": v for k, v in expected.items()}, rel=1e-9)
    assert set(found.errors) == {"is_efficientnet_lite0_300", "kid_efficientnet_lite0_300"}
    assert any("subsets of 200 instead of 1000" in warning for warning in found.warnings)


def test_verified_inception_gets_the_published_names():
    real, spatial = features(1000, 1), features(1000, 3, dim=7)
    wide = spatial.astype(np.float64)
    reference = reference_of(
        real, "inception", features=real, mu_s=wide.mean(axis=0), sigma_s=np.cov(wide, rowvar=False)
    )
    found = score(real, features(1000, 2, dim=10), reference, extractor="inception", spatial=spatial)
    assert set(found.metrics) == {"fid_1k", "sfid_1k", "is_1k", "kid_1k", "precision_1k", "recall_1k"}
    assert found.metrics["fid_1k"] < 1e-6 and found.metrics["sfid_1k"] < 1e-6
    assert found.metrics["precision_1k"] == found.metrics["recall_1k"] == 1
    assert found.warnings == []


def test_without_reference_features_only_frechet_and_inception_scores_are_given():
    found = score(features(50, 0), features(50, 2), reference_of(features(60, 1)), extractor="efficientnet-lite0")
    assert set(found.metrics) == {"fd_efficientnet_lite0_50", "is_efficientnet_lite0_50"}


@pytest.mark.parametrize(
    ("n", "n_real", "texts"), [(31, 32, ["31 images"]), (32, 31, ["31 reference images"]), (32, 32, [])]
)
def test_fewer_images_than_twice_the_dimensions_are_warned_about(n, n_real, texts):
    found = score(features(n, 0), features(n, 2), reference_of(features(n_real, 1)), extractor="efficientnet-lite0")
    assert [warning.split(" are fewer")[0] for warning in found.warnings] == texts
    assert all("at least 32" in warning for warning in found.warnings)


def test_a_reference_of_another_extractor_or_dimension_is_refused():
    reference = reference_of(features(60, 1))
    with pytest.raises(ValueError, match="reference of extractor 'efficientnet-lite0', expected 'inception'"):
        score(features(50, 0), features(50, 2), reference, extractor="inception")
    with pytest.raises(ValueError, match=r"shape \(50, 8\), expected \(N, 16\)"):
        score(features(50, 0, dim=8), features(50, 2), reference, extractor="efficientnet-lite0")
