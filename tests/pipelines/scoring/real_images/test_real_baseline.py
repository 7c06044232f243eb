"""The real baseline has as many images as the score that it is read against."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluation.compare import compare_reports
from evaluation.extractors import Features
from evaluation.merge_reports import merge_reports
from evaluation.metric_names import parse_metric_name
from evaluation.metrics import frechet_distance
from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from evaluation.score import Score
from pipelines.scoring.reports.build_report import build_report, compute_ratios, scattered_positions

DIM, CLASSES = 4, 3
REFERENCE = ReferenceStatistics(
    n=100, mu=np.zeros(DIM), sigma=np.eye(DIM), extractor="efficientnet-lite0", extractor_sha256="ab"
)


def images(count, seed):
    """Features of images in the order of their classes; every class has another mean."""
    offset = np.repeat(np.arange(CLASSES), -(-count // CLASSES))[:count, None]
    return Features((np.random.RandomState(seed).randn(count, DIM) + 3 * offset).astype(np.float32))


def distance(features):
    wide = features.astype(np.float64)
    return frechet_distance(wide.mean(axis=0), np.cov(wide, rowvar=False), REFERENCE.mu, REFERENCE.sigma)


def report(num_samples, held_out, samples=None, sampler="ddpm"):
    protocol = EvaluationProtocol(
        sampler=sampler,
        decoder="aa",
        extractor="efficientnet-lite0",
        extractor_sha256="ab",
        reference_digest="cc",
        num_samples=num_samples,
    )
    samples = images(num_samples, 0) if samples is None else samples
    return build_report(protocol, samples, REFERENCE, held_out, checkpoint="x", digest="y")


def test_of_more_held_out_images_as_many_count_from_all_classes():
    held_out = images(90, 1)
    found = report(30, held_out)
    assert {name.rpartition("_")[2] for name in (*found.metrics, *found.real_baseline)} == {"30"}
    rows = held_out.features[::3]  # ten of each class, not the first class alone
    assert found.real_baseline["fd_efficientnet_lite0_30"] == pytest.approx(distance(rows), rel=1e-9)


def test_beside_fewer_held_out_images_as_many_samples_are_scored_too():
    held_out = images(12, 1)
    found = report(30, held_out)
    assert found.real_baseline["fd_efficientnet_lite0_12"] == pytest.approx(distance(held_out.features), rel=1e-9)
    first = images(30, 0).features[:12]
    assert found.metrics["fd_efficientnet_lite0_12"] == pytest.approx(distance(first), rel=1e-9)
    assert "fd_efficientnet_lite0_30" in found.metrics


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_of_given_images_as_many_come_from_all_classes(order):
    """They are about as far as all of them; those of the first class have the reference's own mean."""
    given = images(900, 0).features
    if order == "in turn":
        given = given.reshape(CLASSES, -1, DIM).swapaxes(0, 1).reshape(-1, DIM)
    found = report(900, images(90, 1), Features(given), sampler="unknown").metrics
    whole = found["fd_efficientnet_lite0_900"]
    assert whole > 50 and found["fd_efficientnet_lite0_90"] == pytest.approx(whole, rel=0.2)
    assert found["ratio_fd_efficientnet_lite0_90"] == pytest.approx(1, abs=0.2)
    first = report(900, images(90, 1), Features(given)).metrics["fd_efficientnet_lite0_90"]
    assert first == pytest.approx(distance(given[:90]), rel=1e-9) and (first < 1) == (order == "sorted")


def test_scattered_positions_are_one_of_each_stretch():
    assert scattered_positions(6, 6).tolist() == list(range(6)) and len(scattered_positions(6, 0)) == 0
    found = scattered_positions(700, 300)
    assert all(start <= at < end for at, start, end in zip(found, *stretches(700, 300), strict=True))
    assert len({*(scattered_positions(1000, 100) % 10).tolist()}) == 10  # classes in turn
    np.testing.assert_array_equal(found, scattered_positions(700, 300))


def stretches(length, count):
    bounds = [length * k // count for k in range(count + 1)]
    return bounds[:-1], bounds[1:]


def test_without_held_out_images_there_is_no_real_baseline():
    assert report(30, None).real_baseline == {}


def test_the_ratio_is_that_of_as_many_samples_to_as_many_held_out_images():
    for num_samples, num_held_out in ((90, 60), (30, 90), (60, 60)):
        n = min(num_samples, num_held_out)
        found = report(num_samples, images(num_held_out, 1))
        name = f"fd_efficientnet_lite0_{n}"
        assert found.metrics[f"ratio_{name}"] == found.metrics[name] / found.real_baseline[name]
        assert found.errors[f"ratio_{name}"] > 0 and [len(side) for side in found.deviations[f"ratio_{name}"]] == [
            10,
            10,
        ]
        assert found.missing == {} and not any(key.startswith("ratio") for key in found.real_baseline)
        assert EvaluationReport.from_json(found.to_json()) == found
        others = {key for key in found.errors if not key.startswith("ratio")}
        assert {parse_metric_name(key).num_samples for key in others} == {num_samples}


@pytest.mark.parametrize(("count", "given"), [(2 * DIM, False), (2 * DIM + 1, True)])
def test_a_ratio_needs_more_than_twice_as_many_images_as_dimensions(count, given):
    found, name = report(30, images(count, 1)), f"ratio_fd_efficientnet_lite0_{count}"
    assert (name in found.metrics) == given
    assert found.missing == ({} if given else {name: "8 images, and at least 9 are needed"})
    assert json.loads(found.to_json())["metrics"].get(name) == found.metrics.get(name)
    assert found.deviations == {}  # too few for blocks


def test_real_images_at_distance_0_have_no_ratio():
    one = Score({"fid_9": 3.0}, {}, [])
    found = compute_ratios(one, Score({"fid_9": 0.0}, {}, []), {"fd": 9, "sfd": 9}, "inception", 9)
    assert found.ratios == {} and "distance 0" in found.missing["ratio_fid_9"]


def test_the_spatial_distance_has_a_ratio_too():
    spatial = [images(count, seed).features[:, :2] for count, seed in ((40, 2), (30, 3))]
    reference = replace(REFERENCE, extractor="inception", mu_s=np.zeros(2), sigma_s=np.eye(2))
    samples, real = (
        Features(images(count, seed).features, spatial=maps)
        for (count, seed), maps in zip(((40, 0), (30, 1)), spatial, strict=True)
    )
    protocol = replace(report(40, None).protocol, extractor="inception")
    found = build_report(protocol, samples, reference, real, checkpoint="x", digest="y")
    expected = [
        frechet_distance(np.zeros(2), np.eye(2), each.mean(axis=0), np.cov(each, rowvar=False))
        for each in (maps[:30].astype(np.float64) for maps in spatial)
    ]
    assert found.metrics["ratio_sfid_30"] == pytest.approx(expected[0] / expected[1], rel=1e-9)
    assert {"ratio_sfid_30", "ratio_fid_30"} == found.deviations.keys() == {*found.errors} & {*found.deviations}


def test_samples_that_fit_one_feature_space_only_are_found():
    """The gamed samples have the reference's own mean and covariance in one space, the honest ones are near in both."""
    rng = np.random.RandomState(5)
    first = rng.randn(300, DIM)
    first = (first - first.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(first, rowvar=False))).T
    drawn = {
        "honest": (rng.randn(300, DIM) + 0.3, rng.randn(300, DIM) + 0.3),
        "gamed": (first, rng.randn(300, DIM) + 1),
    }
    reports = {}
    for checkpoint, spaces in drawn.items():
        parts = []
        for extractor, samples in zip(("efficientnet-lite0", "dinov2-vit-s-14"), spaces, strict=True):
            parts.append(
                build_report(
                    replace(report(300, None).protocol, extractor=extractor),
                    Features(samples.astype(np.float32)),
                    replace(REFERENCE, extractor=extractor),
                    Features(np.random.RandomState(7).randn(300, DIM).astype(np.float32)),
                    checkpoint=checkpoint,
                    digest=checkpoint,
                )
            )
        reports[checkpoint] = merge_reports(parts)
    (warning,) = [text for text in reports["gamed"].all_warnings if "better than real images" in text]
    assert "better than real images in efficientnet-lite0 (" in warning and "worse in dinov2-vit-s-14" in warning
    assert not any("better than real images" in text for text in reports["honest"].all_warnings)
    assert (
        reports["gamed"].metrics["fd_efficientnet_lite0_300"] < reports["honest"].metrics["fd_efficientnet_lite0_300"]
    )
    assert reports["gamed"].metrics["fdr_300"] > reports["honest"].metrics["fdr_300"]
    (found,) = compare_reports(list(reports.values())).disagreements
    assert (found.other, found.better, found.worse) == ("gamed", ["efficientnet-lite0"], ["dinov2-vit-s-14"])
