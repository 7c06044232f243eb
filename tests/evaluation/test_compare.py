"""Only equal protocols are compared, and differences within the error are marked."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from evaluation.compare import compare_reports, estimate_with_standard_error, find_best
from evaluation.merge_reports import merge_reports
from evaluation.metrics import inception_score
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport

PROTOCOL = EvaluationProtocol(decoder="aa", extractor="inception", extractor_sha256="bb", reference_digest="cc")


def report(checkpoint, fid, error=None, **changes):
    return EvaluationReport(
        protocol=replace(PROTOCOL, **changes),
        checkpoint=checkpoint,
        checkpoint_digest="dd",
        metrics={"fid_50k": fid, "precision_50k": 0.7},
        errors={} if error is None else {"fid_50k": error},
    )


A, B, C = report("out/a/step_1", 9.62, 0.03), report("out/b/step_1", 9.58, 0.03), report("out/b/step_2", 9.5, 0.04)


def test_the_table_marks_differences_within_the_error():
    """0.04 is less than sqrt(0.03^2 + 0.03^2) = 0.042; 0.12 is more than 0.05."""
    assert compare_reports([A, B, C]).table() == (
        "metric         a/step_1      b/step_1        b/step_2\n"
        "fid_50k        9.62 +- 0.03  9.58 +- 0.03 ~  9.5 +- 0.04\n"
        "precision_50k  0.7           0.7             0.7\n"
        "~ differs from a/step_1 by less than the combined error.\n"
    )


def test_without_any_error_nothing_is_marked():
    found = compare_reports([report("a", 9.62), report("b", 9.62)])
    assert not found.is_within_error("fid_50k", 1) and "~" not in found.table()


def test_equal_values_with_errors_of_0_are_no_difference():
    """A precision of 1 has a jackknife error of 0."""
    ones = [report(name, 1.0, 0.0) for name in "ab"]
    assert compare_reports(ones).is_within_error("fid_50k", 1) and "1 +- 0 ~" in compare_reports(ones).table()
    assert not compare_reports([ones[0], report("b", 1.0001, 0.0)]).is_within_error("fid_50k", 1)


@pytest.mark.parametrize(("fid", "disagreements"), [(9.0, 0), (8.0, 1)])
def test_equal_distances_with_errors_of_0_are_no_disagreement(fid, disagreements):
    lite0 = replace(PROTOCOL, extractor="efficientnet-lite0")
    reports = []
    for name, *distances in (("a", 9.0, 30.0), ("b", fid, 31.0)):
        first, second = zip(("fid_50k", "fd_efficientnet_lite0_50k"), distances, strict=True)
        other = replace(scored(name, *second, 0.0), protocol=lite0)
        reports.append(merge_reports([scored(name, *first, 0.0), other]))
    assert len(compare_reports(reports).disagreements) == disagreements


def test_one_known_error_is_better_than_none():
    assert compare_reports([report("a", 9.62, 0.1), report("b", 9.57)]).is_within_error("fid_50k", 1)
    assert not compare_reports([report("a", 9.62, 0.1), report("b", 9.47)]).is_within_error("fid_50k", 1)


def test_the_error_over_seeds_takes_precedence():
    """Means 9.6 and 9.53 with a standard error of 0.1: no difference; of 0.01: one."""
    wide, narrow = ({"fid_50k": [value - error, value + error]} for value, error in ((9.6, 0.1), (9.6, 0.01)))
    for repeats, same in ((wide, True), (narrow, False)):
        other = replace(report("b", 9.0, 0.001), repeats={"fid_50k": [9.53, 9.53]})
        found = compare_reports([replace(A, repeats=repeats), other])
        assert found.is_within_error("fid_50k", 1) == same
        assert "9.6 +- 0" in found.table()


def test_unequal_protocols_are_refused_by_the_fields_that_differ():
    other = report("b", 2.27, cfg_scale=1.5, cfg_channels=3)
    with pytest.raises(ValueError) as error:
        compare_reports([A, other])
    message = str(error.value)
    fields = "cfg_scale: 1.0 and 1.5; cfg_channels: None and 3"
    labels = f"{A.protocol_id} ({A.protocol.summary}) and {other.protocol_id} ({other.protocol.summary})"
    assert f"reports of protocols {labels}, which differ in {fields}, expected" in message
    assert "Evaluate all checkpoints with one recipe" in message


def test_an_unnamed_precision_differs_from_another_one():
    for reports in ([A, report("b", 9.6, dtype="bfloat16")], [report("b", 9.6, dtype="bfloat16"), A]):
        with pytest.raises(ValueError, match=r"differ in dtype: '(float32|bfloat16)' and '(bfloat16|float32)',"):
            compare_reports(reports)
        assert compare_reports(reports, allow_unequal=True).differing == ["dtype"]


def test_unequal_protocols_may_be_allowed_and_are_named():
    smaller = replace(report("b", 12.0, num_samples=10_000), metrics={"fid_10k": 12.0})
    found = compare_reports([A, smaller], allow_unequal=True)
    assert found.differing == ["num_samples"] and found.metrics == ["fid_50k", "precision_50k", "fid_10k"]
    assert found.table().endswith("Not comparable: the protocols differ in num_samples.\n")
    assert [line.split()[1:] for line in found.table().splitlines()[1:4]] == [["9.62", "+-", "0.03"], ["0.7"], ["12"]]


def test_equal_checkpoints_are_numbered():
    assert compare_reports([A, A]).names == ["1: step_1", "2: step_1"]
    assert compare_reports([report("a", 1.0), report("s3://x/b/", 2.0)]).names == ["a", "s3://x/b"]


def test_one_report_is_no_comparison():
    with pytest.raises(ValueError, match="1 reports to compare, expected at least 2"):
        compare_reports([A])


def scored(checkpoint, name, value, error, **fields):
    return EvaluationReport(
        protocol=PROTOCOL,
        checkpoint=checkpoint,
        checkpoint_digest="dd",
        metrics={name: value},
        errors={name: error},
        **fields,
    )


@pytest.mark.parametrize(("other", "within"), [(101.5, True), (101.52, False)])
def test_the_error_of_an_inception_score_is_that_of_the_mean_over_its_splits(other, within):
    """3.2 over 10 splits is a standard error of 3.2 / 3 = 1.067, and 1.508 for the difference of two."""
    found = compare_reports([scored("a", "is_50k", 100.0, 3.2), scored("b", "is_50k", other, 3.2)])
    assert found.is_within_error("is_50k", 1) == within
    assert "100 +- 1.07" in found.table()


def test_the_error_of_an_inception_score_follows_from_its_splits():
    logits = np.random.default_rng(0).normal(size=(2000, 5)) * 3
    scores = [inception_score(logits[part], splits=1)[0] for part in np.split(np.arange(2000), 10)]
    both = scored("a", "is_2k", float(np.mean(scores)), float(np.std(scores)))
    assert estimate_with_standard_error(both, "is_2k")[1] == pytest.approx(scipy.stats.sem(scores))


def test_the_error_of_a_kernel_distance_is_known_of_repeats_only():
    """Subsets overlap, so that their standard deviation says nothing about other samples."""
    name, repeats = "kid_50k", {"kid_50k": [0.010, 0.012]}
    once, again = scored("a", name, 0.011, 0.05), scored("b", name, 0.0112, 0.05)
    found = compare_reports([once, again])
    assert not found.is_within_error(name, 1) and "+-" not in found.table()
    found = compare_reports([replace(once, repeats=repeats), again])
    assert found.is_within_error(name, 1) and "0.011 +- 0.001" in found.table()


def test_repeats_of_an_inception_score_have_the_error_over_seeds():
    found = compare_reports([scored("a", "is_50k", 99.0, 3.2, repeats={"is_50k": [99.0, 101.0]}), A])
    assert [line.split()[1:4] for line in found.table().splitlines()[1:2]] == [["100", "+-", "1"]]


@pytest.mark.parametrize(("first", "other", "comparable"), [("x", "x", True), ("", "y", True), ("x", "y", False)])
def test_ratios_to_other_held_out_images_are_not_compared(first, other, comparable):
    """Reports of earlier versions do not say which images they are."""
    name = "ratio_fid_10k"
    reports = [scored("a", name, 2.0, 0.3, held_out_digest=first), scored("b", name, 2.1, 0.3, held_out_digest=other)]
    found = compare_reports(reports)
    assert found.is_within_error(name, 1) == comparable
    note = "Ratios to real images are not comparable: other held-out images in b than in a."
    assert (note in found.table().splitlines()) != comparable


def test_other_held_out_images_are_said_whatever_the_order():
    """A report of an earlier version, or one without ratios, does not hide that two others differ."""
    name = "ratio_fid_10k"
    unknown, without = scored("a", name, 2.0, 0.3), report("d", 9.0)
    first, other = (scored(each, name, 2.1, 0.3, held_out_digest=each) for each in "bc")
    for reports in ([unknown, first, other], [first, unknown, other], [without, first, other], [first, other, without]):
        note = "Ratios to real images are not comparable: other held-out images in c than in b."
        assert note in compare_reports(reports).table().splitlines()
    assert "not comparable" not in compare_reports([unknown, first, without]).table()


def test_reports_against_different_readable_images_say_so():
    some, all_read = replace(A, unreadable={"reference": 50, "held_out": 2}), B
    note = "Real images that could not be read: 50 of the reference and 2 of the held-out images in a/step_1; "
    note += "none known in b/step_1. The protocols are equal, but the real images were not."
    assert note in compare_reports([some, all_read]).table().splitlines()
    for reports in ([some, replace(B, unreadable=some.unreadable)], [A, B]):
        assert "could not be read" not in compare_reports(reports).table()
    guided = compare_reports([some, report("b", 9.0, cfg_scale=1.5)], allow_unequal=True).table()
    assert "could not be read" in guided and "protocols are equal" not in guided


def test_scores_against_other_columns_of_images_are_not_compared():
    scan, thumb = replace(A, image_column="scan"), replace(B, image_column="thumb")
    with pytest.raises(
        ValueError, match=f"protocols {A.protocol_id} .*differ in images.image_column: 'scan' and 'thumb'"
    ):
        compare_reports([scan, thumb])
    assert compare_reports([scan, thumb], allow_unequal=True).differing == ["images.image_column"]
    assert compare_reports([scan, B]).differing == []  # of an earlier release, which did not record it
    assert find_best([scan, thumb])[1] == "scores against different columns of images do not rank checkpoints"
    assert find_best([scan, B]) == (B, "")


def test_the_best_is_the_lowest_of_sound_reports_of_one_protocol():
    assert find_best([A, C, B]) == (C, "")
    defective = replace(C, disqualified="all samples have the same features")
    assert find_best([A, defective, B]) == (B, "")
    best, reason = find_best([defective])
    assert best is None and "defective" in reason
    assert find_best([]) == (None, "no checkpoint was scored")


def test_scores_of_different_protocols_have_no_best():
    for changes in ({"cfg_scale": 1.5}, {"reference_digest": "dogs"}, {"num_samples": 1000}):
        best, reason = find_best([A, report("other", 1.0, **changes)])
        assert best is None and reason == "scores of different protocols do not rank checkpoints"
    defective = replace(report("other", 1.0, cfg_scale=1.5), disqualified="all samples have the same features")
    assert find_best([A, defective]) == (A, "")
