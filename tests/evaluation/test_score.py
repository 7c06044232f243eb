"""Scores have names, errors and warnings, and cover exactly as many images as their names say."""

import numpy as np
import pytest

from evaluation.metrics import (
    cmmd,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_scores,
    median_distance,
    mind,
    precision_recall,
    rbf_mmd,
)
from evaluation.reference import ReferenceStatistics
from evaluation.score import explain_missing, score, summarize_missing
from evaluation.statistics import InceptionScoreSums
from evaluation.uncertainty import extrapolate


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


def score_lite0(generated, logits, reference, num_samples=None, **options):
    return score(
        generated,
        logits,
        reference,
        extractor="efficientnet-lite0",
        num_samples=num_samples or len(generated),
        **options,
    )


def lite0_names(n, *kinds):
    return {f"{kind}_efficientnet_lite0_{n}" for kind in kinds}


def test_scores_are_those_of_the_metrics_under_their_names():
    generated, real, logits = features(300, 0) + 0.2, features(200, 1), features(300, 2, dim=10)
    reference = reference_of(real, features=real)
    found = score_lite0(generated, logits, reference)
    wide = generated.astype(np.float64)
    expected = {
        "fd": frechet_distance(wide.mean(axis=0), np.cov(wide, rowvar=False), reference.mu, reference.sigma),
        "fd_infinity": extrapolate(found.curve).value,
        "is": inception_score(logits)[0],
        "kid": kernel_distance(generated, real, subset_size=200)[0],
        "precision": precision_recall(generated, real)[0],
        "recall": precision_recall(generated, real)[1],
        "density": manifold_scores(generated, real).density,
        "coverage": manifold_scores(generated, real).coverage,
    }
    assert found.metrics == pytest.approx({f"{k}_efficientnet_lite0_300": v for k, v in expected.items()}, rel=1e-9)
    assert set(found.errors) == lite0_names(300, *expected)
    assert min(found.errors.values()) > 0
    assert any("subsets of 200 instead of 1000" in warning for warning in found.warnings)


def test_the_curve_begins_at_twice_the_dimensions_and_ends_at_the_score():
    found = score_lite0(features(300, 0), None, reference_of(features(200, 1)))
    assert [count for count, _ in found.curve] == [60, 90, 120, 150, 180, 210, 240, 270, 300]
    assert found.curve[-1][1] == pytest.approx(found.metrics["fd_efficientnet_lite0_300"], rel=1e-9)


@pytest.mark.parametrize(("n", "given"), [(50, False), (60, True)])
def test_infinity_needs_five_sizes_of_at_least_twice_the_dimensions(n, given):
    """Of 50 images 35, 40, 45 and 50 are more than 32; of 60 also 36, 42, 48 and 54."""
    found = score_lite0(features(n, 0), None, reference_of(features(200, 1)))
    assert (f"fd_infinity_efficientnet_lite0_{n}" in found.metrics) == given


def test_without_errors_the_numbers_are_the_same():
    generated, reference = features(300, 0), reference_of(features(200, 1))
    found, quick = (score_lite0(generated, None, reference, errors=errors) for errors in (True, False))
    assert quick.metrics == pytest.approx({"fd_efficientnet_lite0_300": found.metrics["fd_efficientnet_lite0_300"]})
    assert quick.errors == {} and quick.curve == []


def test_verified_inception_gets_the_published_names():
    real, spatial = features(1000, 1), features(1000, 3, dim=7)
    wide = spatial.astype(np.float64)
    reference = reference_of(
        real, "inception", features=real, mu_s=wide.mean(axis=0), sigma_s=np.cov(wide, rowvar=False)
    )
    logits = features(1000, 2, dim=10)
    found = score(real, logits, reference, extractor="inception", num_samples=1000, spatial=spatial)
    kinds = ("fid", "fid_infinity", "sfid", "is", "kid", "precision", "recall", "density", "coverage")
    assert list(found.metrics) == [f"{kind}_1k" for kind in kinds]
    assert set(found.errors) == {f"{kind}_1k" for kind in kinds}
    assert found.metrics["fid_1k"] < 1e-6 and found.metrics["sfid_1k"] < 1e-6
    assert found.metrics["precision_1k"] == found.metrics["recall_1k"] == found.metrics["coverage_1k"] == 1
    assert found.warnings == []


def test_logits_may_be_given_as_sums():
    generated, logits, reference = features(60, 0), features(60, 2, dim=7), reference_of(features(60, 1))
    sums = InceptionScoreSums(60, 7)
    for part in np.array_split(np.arange(60), 4):
        sums.update(part, logits[part])
    found, stored = score_lite0(generated, sums, reference), score_lite0(generated, logits, reference)
    assert found.metrics == pytest.approx(stored.metrics, rel=1e-12)


def test_without_reference_features_only_frechet_and_inception_scores_are_given():
    found = score_lite0(features(50, 0), features(50, 2), reference_of(features(60, 1)))
    assert set(found.metrics) == lite0_names(50, "fd", "is")


def test_few_images_get_a_distance_and_a_warning():
    real = features(60, 1)
    found = score_lite0(features(9, 0), features(9, 2), reference_of(real, features=real))
    assert set(found.metrics) == lite0_names(9, "fd") and found.errors == {}
    assert any("9 images are too few" in warning for warning in found.warnings)


@pytest.mark.parametrize("what", ["features", "logits", "spatial", "sums"])
@pytest.mark.parametrize("off", [-1, 1])
def test_one_image_too_many_or_too_few_is_refused(what, off):
    """Such as the padding of a last batch."""
    counts = {"features": 50, "logits": 50, "spatial": 50, what: 50 + off}
    logits = InceptionScoreSums(50 + off, 7) if what == "sums" else features(counts["logits"], 2, dim=7)
    with pytest.raises(ValueError, match=f"of {50 + off} images, expected exactly 50.*no padding"):
        score_lite0(
            features(counts["features"], 0),
            logits,
            reference_of(features(60, 1)),
            num_samples=50,
            spatial=features(counts["spatial"], 3, dim=7),
        )


@pytest.mark.parametrize(
    ("n", "n_real", "texts"), [(31, 32, ["31 images"]), (32, 31, ["31 reference images"]), (32, 32, [])]
)
def test_fewer_images_than_twice_the_dimensions_are_warned_about(n, n_real, texts):
    found = score_lite0(features(n, 0), features(n, 2), reference_of(features(n_real, 1)))
    assert [warning.split(" are fewer")[0] for warning in found.warnings] == texts
    assert all("at least 32" in warning for warning in found.warnings)


def test_a_reference_of_another_extractor_or_dimension_is_refused():
    reference = reference_of(features(60, 1))
    with pytest.raises(ValueError, match="reference of extractor 'efficientnet-lite0', expected 'inception'"):
        score(features(50, 0), features(50, 2), reference, extractor="inception", num_samples=50)
    with pytest.raises(ValueError, match=r"means of shapes \(16,\) and \(8,\).*expected.*Use one extractor"):
        score_lite0(features(50, 0, dim=8), features(50, 2), reference)


@pytest.mark.parametrize("num_real", [2, 5, 6])
def test_few_real_images_give_the_metrics_that_they_allow_and_reasons_for_the_others(num_real):
    generated, real, logits = features(20, 0), features(num_real, 1), features(20, 2, dim=10)
    found = score_lite0(generated, logits, reference_of(real, features=real))
    manifold = lite0_names(20, "precision", "recall", "density", "coverage")
    assert found.metrics.keys() >= lite0_names(20, "fd", "is", "kid")
    expected = kernel_distance(generated, real, subset_size=num_real)
    assert found.metrics["kid_efficientnet_lite0_20"] == pytest.approx(expected[0], rel=1e-9)
    if num_real > 5:
        assert found.metrics.keys() >= manifold and found.missing == {}
        return
    reason = f"{num_real} real images, and more than 5 are needed"
    assert found.missing == dict.fromkeys(manifold, reason) and not found.metrics.keys() & manifold
    assert found.warnings[0] == f"precision, recall, density, coverage cannot be computed: there are {reason}."


@pytest.mark.parametrize("equal", [("real",), ("generated",), ("real", "generated")])
def test_equal_images_on_either_side_are_scored(equal):
    generated, real = features(40, 0), features(30, 1)
    generated = np.full_like(generated, 0.25) if "generated" in equal else generated
    real = np.zeros_like(real) if "real" in equal else real
    found = score_lite0(generated, features(40, 2, dim=10), reference_of(real, features=real))
    means = ((generated.mean(axis=0, dtype=float) - real.mean(axis=0, dtype=float)) ** 2).sum()
    spread = sum(np.var(side.astype(float), axis=0, ddof=1).sum() for side in (generated, real))
    assert found.metrics["fd_efficientnet_lite0_40"] == pytest.approx(means + spread, rel=1e-9)
    assert all(np.isfinite(value) for value in (*found.metrics.values(), *found.errors.values()))


def test_a_single_real_image_allows_no_kernel_distance():
    found = explain_missing(20, 1)
    assert found.keys() == {"kid", "precision", "recall", "density", "coverage"}
    assert [line.partition(":")[0] for line in summarize_missing(found)] == [
        "kid cannot be computed",
        "precision, recall, density, coverage cannot be computed",
    ]


def test_further_metrics_are_those_that_are_asked_for():
    generated, real = features(300, 0) + 0.2, features(200, 1)
    reference, kinds = reference_of(real, features=real), ("cmmd", "mind", "rbf_mmd")
    found = score_lite0(generated, None, reference, further=kinds)
    expected = {
        "cmmd": cmmd(generated, real),
        "mind": mind(generated, real),
        "rbf_mmd": rbf_mmd(generated, real, median_distance(real)),
    }
    names = {f"{kind}_efficientnet_lite0_300": value for kind, value in expected.items()}
    assert {name: found.metrics[name] for name in names} == names
    plain = score_lite0(generated, None, reference)
    assert plain.metrics == {name: value for name, value in found.metrics.items() if name not in names}


def test_further_metrics_that_cannot_be_computed_say_why():
    generated, real = features(40, 0), features(30, 1)
    without = score_lite0(generated, None, reference_of(real), further=("cmmd",))
    assert without.missing == {"cmmd_efficientnet_lite0_40": "the reference holds no features of single images"}
    few = score_lite0(generated[:9], None, reference_of(real, features=real), further=("mind",))
    assert few.missing == {"mind_efficientnet_lite0_9": "9 samples, and at least 10 are needed"}
    equal = np.ones((30, real.shape[1]), np.float32)
    equal = score_lite0(generated, None, reference_of(real, features=equal), further=("rbf_mmd",))
    assert "median distance is 0" in equal.missing["rbf_mmd_efficientnet_lite0_40"]
