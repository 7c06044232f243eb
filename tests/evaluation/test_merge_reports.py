"""One report with the scores of several extractors: each part is what its extractor alone would have given."""

import json
from dataclasses import replace

import pytest

from evaluation.compare import compare_reports
from evaluation.merge_reports import merge_reports
from evaluation.page import render_page
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
    # What the first one's warnings say too is said once.
    assert others == [replace(part, warnings=part.warnings[1:]) for part in (TWO, THREE)]
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


def test_reports_without_a_shared_extractor_are_refused():
    with pytest.raises(InvalidInput, match="differ in extractor: 'efficientnet-lite0' and 'inception'; extractor_sha"):
        compare_reports([merge_reports([ONE, TWO]), THREE])


def with_ratio(one, name, ratio, side):
    """A report with a ratio at N = 300, whose deviations are plus and minus `side` for samples and half for real."""
    deviations = [[side, -side], [side / 2, -side / 2]]
    return replace(
        one,
        metrics={**one.metrics, name: ratio},
        errors={**one.errors, name: 1.25**0.5 * side},
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
