"""One report with the scores of several extractors: each part is what its extractor alone would have given."""

import json
from dataclasses import replace
from itertools import permutations

import pytest

from evaluation.compare import compare_reports
from evaluation.merge_reports import merge_reports
from evaluation.pages.report_page import render_page
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from raydit.errors import InvalidInput

LITE0 = EvaluationProtocol(decoder="aa", extractor="efficientnet-lite0", extractor_sha256="bb", reference_digest="cc")
DINOV2 = replace(LITE0, extractor="dinov2-vit-l-14", extractor_sha256="dd", reference_digest="ee")
INCEPTION = replace(LITE0, extractor="inception", extractor_sha256="ff", reference_digest="gg")


def report(protocol, stem, value, checkpoint="step_0000100", **fields):
    """The report of a run with one extractor."""
    name = f"{stem}_50k"
    given = {
        "errors": {name: 0.5},
        "real_baseline": {f"{stem}_300": value / 10},
        "reconstructions": {f"{stem}_300": value / 5},
        "missing": {name.replace("fd", "kid").replace("fid", "kid"): "2 real images"},
        "curve": [(25_000, value + 1), (50_000, value)],
        "warnings": ["samples are few", f"{stem} is biased"],
        "timings": {"features_seconds": 1.0},
    }
    return EvaluationReport(
        protocol=protocol, checkpoint=checkpoint, checkpoint_digest="d1", metrics={name: value}, **{**given, **fields}
    )


ONE = report(LITE0, "fd_efficientnet_lite0", 30.0)
TWO = report(DINOV2, "fd_dinov2_vit_l_14", 200.0)
THREE = report(INCEPTION, "fid", 9.0)
MERGED = merge_reports([ONE, TWO, THREE])


def test_the_parts_of_a_merged_report_are_the_reports_of_single_extractors():
    first, *others = MERGED.parts
    assert first == ONE
    assert others == [TWO, THREE]
    assert merge_reports([ONE]) == ONE and ONE.parts == [ONE]


def test_the_first_extractor_leads():
    assert (MERGED.protocol, MERGED.headline, MERGED.curve) == (LITE0, ONE.headline, ONE.curve)
    other = merge_reports([TWO, THREE, ONE])
    assert (other.protocol_id, other.headline) == (TWO.protocol_id, TWO.headline)
    assert [each.extractor for each in other.protocols] == ["dinov2-vit-l-14", "inception", "efficientnet-lite0"]
    assert {**other.metrics} == {**MERGED.metrics} and list(other.metrics) != list(MERGED.metrics)


def test_each_metric_has_the_protocol_of_its_extractor():
    names = ["fd_efficientnet_lite0_50k", "fd_dinov2_vit_l_14_300", "fid_300"]
    assert [MERGED.protocol_for(name) for name in names] == [LITE0, DINOV2, INCEPTION]
    assert MERGED.protocol_for("fid_infinity_50k") == MERGED.protocol_for("precision_50k") == INCEPTION
    assert ONE.protocol_for("fid_50k") == LITE0  # of one extractor all metrics are its own
    with pytest.raises(InvalidInput, match="metric fd_vgg_50k, expected one of efficientnet-lite0 or dinov2"):
        MERGED.protocol_for("fd_vgg_50k")


def test_a_merged_report_survives_storage_with_the_ids_of_all():
    stored = json.loads(MERGED.to_json())
    assert (stored["protocol_id"], stored["protocol"]) == (ONE.protocol_id, LITE0.to_dict())
    ids = {"efficientnet-lite0": ONE, "dinov2-vit-l-14": TWO, "inception": THREE}
    assert stored["protocols"] == {name: each.protocol_id for name, each in ids.items()}
    assert stored["metrics"]["kid_dinov2_vit_l_14_50k"] is None
    assert EvaluationReport.from_json(MERGED.to_json()) == MERGED


def test_a_report_of_one_extractor_has_no_new_keys():
    assert not {"further", "protocols"} & json.loads(ONE.to_json()).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored["further"][0]["protocol"].update(seed=1), "has the id .*edited"),
        (lambda stored: stored["protocols"].pop("inception"), "found no report"),
        (lambda stored: stored["metrics"].update(fd_vgg_50k=1.0), "metric fd_vgg_50k"),
        (lambda stored: stored["further"][1].update(curve="steep"), "found no report"),
        (lambda stored: stored.update(further=[3]), "found no report"),
    ],
)
def test_an_edited_report_is_refused(change, message):
    stored = json.loads(MERGED.to_json())
    change(stored)
    with pytest.raises(InvalidInput, match=message):
        EvaluationReport.from_json(json.dumps(stored))


def test_a_defect_that_one_extractor_shows_is_the_reports():
    assert merge_reports([ONE, replace(TWO, disqualified="equal features")]).disqualified == "equal features"


def test_tables_and_pages_show_every_extractor():
    table = MERGED.table()
    assert all(stem in table for stem in ("fd_efficientnet_lite0 ", "fd_dinov2_vit_l_14 ", "fid "))
    page = render_page(MERGED)
    for protocol in MERGED.protocols:
        assert f"Protocol, {protocol.extractor}</h2>" in page and protocol.protocol_id in page
        assert f"Fréchet distance against N, {protocol.extractor}</h2>" in page
    assert page.count("samples are few") == 1 and "inception: fid is biased" in page
    assert "<h2>Protocol</h2>" in render_page(ONE) and "<h2>Fréchet distance against N</h2>" in render_page(ONE)


def test_what_is_said_of_some_extractors_names_them_and_what_is_said_of_all_is_said_once():
    names = ["efficientnet-lite0", "dinov2-vit-l-14", "inception"]
    stems = ["fd_efficientnet_lite0", "fd_dinov2_vit_l_14", "fid"]
    biased = [f"{name}: {stem} is biased" for name, stem in zip(names, stems, strict=True)]
    assert MERGED.all_warnings == ["samples are few", *biased]
    assert ONE.all_warnings == ["samples are few", "fd_efficientnet_lite0 is biased"]
    with_shares = [
        replace(one, metrics={**one.metrics, f"{stem}_300": one.metrics[f"{stem}_50k"]})
        for one, stem in zip((ONE, TWO, THREE), stems, strict=True)
    ]
    shares = [text.partition(" at N = 300")[0] for text in merge_reports(with_shares).explanations]
    distances = ["30", "200", "9"]
    assert shares == [f"{name}: Of the Frechet distance of {each}" for name, each in zip(names, distances, strict=True)]
    assert with_shares[0].explanations[0].startswith("Of the Frechet distance of 30")


def test_reports_are_compared_extractor_by_extractor():
    later = [replace(each, checkpoint="step_0000200") for each in (ONE, TWO, THREE)]
    for other in (merge_reports(later), *later, merge_reports(later[::-1])):
        compared = compare_reports([MERGED, other])
        assert compared.differing == [] and compared.is_within_error(other.headline, 1)
    assert not compare_reports([MERGED, later[1]]).is_within_error(ONE.headline, 1)


def test_a_shared_extractor_with_another_reference_is_refused():
    other = replace(TWO, protocol=replace(DINOV2, reference_digest="new"))
    for reports in ([MERGED, other], [MERGED, merge_reports([ONE, other])]):
        with pytest.raises(InvalidInput, match="differ in reference_digest: 'ee' and 'new'") as error:
            compare_reports(reports)
        assert TWO.protocol_id in str(error.value) and other.protocol_id in str(error.value)
        assert compare_reports(reports, allow_unequal=True).differing == ["reference_digest"]


def test_unequal_protocols_are_refused_whatever_the_order():
    other = merge_reports([ONE, replace(TWO, protocol=replace(DINOV2, reference_digest="new"))])
    for reports in permutations([ONE, MERGED, other]):
        with pytest.raises(InvalidInput, match="differ in reference_digest: '(ee|new)' and '(ee|new)'"):
            compare_reports(reports)
        assert compare_reports(reports, allow_unequal=True).differing == ["reference_digest"]


def test_reports_are_comparable_by_way_of_one_that_shares_an_extractor_with_each():
    for reports in permutations([ONE, merge_reports([ONE, TWO]), TWO]):
        assert compare_reports(reports).differing == []
    for reports in permutations([ONE, merge_reports([ONE, TWO]), THREE]):
        with pytest.raises(InvalidInput, match="differ in extractor: "):
            compare_reports(reports)


def test_reports_without_a_shared_extractor_are_refused():
    with pytest.raises(InvalidInput, match="differ in extractor: 'efficientnet-lite0' and 'inception'; extractor_sha"):
        compare_reports([merge_reports([ONE, TWO]), THREE])


def with_ratio(one, name, ratio, side):
    """A report with a ratio at N = 300, whose deviations are plus and minus `side` for samples and half for real."""
    deviations = [[side, -side], [side / 2, -side / 2]]
    return replace(
        one,
        metrics={**one.metrics, name: ratio},
        errors={**one.errors, name: 1.25**0.5 * abs(side)},
        deviations={name: deviations},
    )


RATIOS = {
    "efficientnet-lite0": with_ratio(ONE, "ratio_fd_efficientnet_lite0_300", 2.0, 0.5),
    "dinov2-vit-l-14": with_ratio(TWO, "ratio_fd_dinov2_vit_l_14_300", 5.0, -0.25),
    "inception": with_ratio(THREE, "ratio_fid_300", 8.0, 0.5),
}


def test_the_mean_of_the_ratios_is_added_and_names_its_extractors():
    reports = list(RATIOS.values())
    merged = merge_reports(reports)
    assert merged.metrics["fdr_300"] == 5.0 and merged.averaged == {"fdr_300": list(RATIOS)}
    assert merged.errors["fdr_300"] == pytest.approx(1.25**0.5 * (0.5 - 0.25 + 0.5) / 3)
    assert EvaluationReport.from_json(merged.to_json()) == merged
    assert json.loads(merged.to_json())["averaged"] == {"fdr_300": list(RATIOS)}
    assert merged.parts[0] == reports[0] and not any("fdr_300" in part.metrics for part in merged.parts)
    again = merge_reports(merged.parts)
    assert (again.metrics, again.errors, again.averaged) == (merged.metrics, merged.errors, merged.averaged)
    assert merge_reports([*merge_reports(reports[:2]).parts, reports[2]]).metrics == merged.metrics
    assert merge_reports(reports[:1]).averaged == {} and "fdr_300" not in merge_reports(reports[:1]).metrics


def test_means_are_comparable_whatever_the_order_of_the_same_protocols():
    reports = list(RATIOS.values())
    merged, turned, two = (merge_reports(each) for each in (reports, reports[::-1], reports[:2]))
    assert merged.protocol_id_for("fdr_300") == turned.protocol_id_for("fdr_300")
    assert merged.protocol_id_for("fdr_300") not in {two.protocol_id_for("fdr_300"), *map(id_of, reports)}
    assert merged.protocol_id_for("ratio_fid_300") == id_of(reports[2])
    with pytest.raises(InvalidInput, match="metric fdr_300, expected one of efficientnet-lite0 or dinov2"):
        MERGED.protocol_id_for("fdr_300")


def id_of(one):
    return one.protocol_id


def test_an_extractor_without_a_ratio_is_left_out_of_the_mean():
    reason = {"ratio_fid_300": "300 images, and at least 4,097 are needed"}
    without = replace(THREE, missing=reason)
    merged = merge_reports([*list(RATIOS.values())[:2], without])
    assert merged.averaged == {"fdr_300": list(RATIOS)[:2]} and merged.metrics["fdr_300"] == 3.5
    one = merge_reports([RATIOS["dinov2-vit-l-14"], without])
    assert one.averaged == {} and one.missing["fdr_300"] == "fewer than 2 extractors have a ratio"
    assert json.loads(one.to_json())["metrics"]["fdr_300"] is None
    assert EvaluationReport.from_json(one.to_json()) == one
    assert one.parts[1].missing == reason


def test_tables_and_pages_show_the_ratios_and_their_mean():
    reason = {"ratio_sfid_300": "300 images, and at least 4,047 are needed"}
    merged = merge_reports([*list(RATIOS.values())[:2], replace(RATIOS["inception"], missing=reason)])
    lines = merged.table().splitlines()
    assert sum(line.startswith("ratio_") for line in lines) == 4
    assert "ratio_fd_dinov2_vit_l_14_300     5 +- 0.2795  times real images, dinov2-vit-l-14" in lines
    assert "ratio_sfid_300                   -            300 images, and at least 4,047 are needed" in lines
    mean = "mean of efficientnet-lite0 and dinov2-vit-l-14 and inception"
    assert any(line.startswith("fdr_300 ") and line.endswith(mean) for line in lines)
    page = render_page(merged)
    assert "Ratios to real images</h2>" in page and mean in page
    assert "inception, spatial: no ratio, 300 images, and at least 4,047 are needed." in page
    assert 'width:25.0%;background:var(--accent)"' in page and 'width:12.5%;background:var(--real)"' in page
    assert page.count("<code>fdr_300</code>") == 2  # below the headline and beside its bar
    assert "Ratios to real images" not in render_page(ONE)


@pytest.mark.parametrize(
    ("ratios", "errors", "warned"),
    [
        ((0.5, 5.0), (0.1, 0.1), True),
        ((0.95, 5.0), (0.1, 0.1), False),  # within the error of 1
        ((0.5, 0.6), (0.1, 0.1), False),
        ((2.0, 5.0), (0.1, 0.1), False),
        ((0.5, 5.0), (None, 0.1), False),
    ],
)
def test_samples_better_than_real_images_in_one_space_only_are_warned_about(ratios, errors, warned):
    names = ["ratio_fd_efficientnet_lite0_300", "ratio_fd_dinov2_vit_l_14_300"]
    parts = [
        replace(one, metrics={**one.metrics, name: ratio}, errors={} if error is None else {name: error}, warnings=[])
        for one, name, ratio, error in zip((ONE, TWO), names, ratios, errors, strict=True)
    ]
    merged = merge_reports(parts)
    expected = "better than real images in efficientnet-lite0 (0.5) and worse in dinov2-vit-l-14 (5), by more than"
    assert [expected in text for text in merged.all_warnings] == ([True] if warned else [])
    assert (expected in render_page(merged)) == warned


def test_spaces_that_disagree_by_more_than_the_errors_are_named():
    """B is 3 better in one space and 30 worse in another, with combined errors of 0.71."""
    names = [report.headline for report in (ONE, TWO, THREE)]
    gamed = [
        replace(one, checkpoint="gamed", metrics={name: one.metrics[name] + change})
        for one, name, change in zip((ONE, TWO, THREE), names, (-3.0, 30.0, 0.3), strict=True)
    ]
    compared = compare_reports([MERGED, merge_reports(gamed)])
    (found,) = compared.disagreements
    assert (found.better, found.worse) == (["efficientnet-lite0"], ["dinov2-vit-l-14"])
    text = "gamed is better than step_0000100 in efficientnet-lite0, and worse in dinov2-vit-l-14, by more than"
    assert f"Feature spaces disagree: {text}" in compared.table()
    turned = compare_reports([merge_reports(gamed), MERGED]).disagreements[0]
    assert (turned.better, turned.worse) == (found.worse, found.better)


@pytest.mark.parametrize("changes", [(-3.0, 0.5), (-0.5, 30.0), (-3.0, -30.0), (3.0, 30.0)])
def test_spaces_that_agree_within_the_errors_are_not(changes):
    others = [
        replace(one, checkpoint="b", metrics={one.headline: one.metrics[one.headline] + change})
        for one, change in zip((ONE, TWO), changes, strict=True)
    ]
    assert compare_reports([MERGED, merge_reports(others)]).disagreements == []
    without = [merge_reports([replace(each, errors={}) for each in pair]) for pair in ((ONE, TWO), others)]
    assert compare_reports(without).disagreements == []


def test_reports_of_unequal_protocols_are_not_said_to_disagree():
    others = [
        replace(one, protocol=replace(one.protocol, cfg_scale=2.0), metrics={one.headline: value})
        for one, value in ((ONE, 1.0), (TWO, 900.0))
    ]
    assert compare_reports([MERGED, merge_reports(others)], allow_unequal=True).disagreements == []


def test_means_of_other_extractors_are_not_compared():
    reports = list(RATIOS.values())
    all_three, two = merge_reports(reports), merge_reports(reports[:2])
    near = replace(merge_reports(reports[::-1]), checkpoint="b")
    assert compare_reports([all_three, near]).is_within_error("fdr_300", 1)
    assert "fdr_300 is the mean of dinov2-vit-l-14 and efficientnet-lite0 and inception." in (
        compare_reports([all_three, near]).table()
    )
    equal = replace(two, checkpoint="b", metrics={**two.metrics, "fdr_300": 5.0})
    compared = compare_reports([all_three, equal])
    assert not compared.is_within_error("fdr_300", 1)
    assert (
        "fdr_300 is not comparable: it is the mean of dinov2-vit-l-14 and efficientnet-lite0 and " in compared.table()
    )
