"""The table of metrics, and the names that it gives."""

import pytest

from evaluation import metric_names
from evaluation.compare import compare_reports
from evaluation.metric_names import (
    METRIC_KINDS,
    MetricKind,
    format_count,
    is_of_extractor,
    mean_ratio_name,
    metric_name,
    parse_metric_name,
)
from evaluation.pages.report_page import render_page
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport


@pytest.mark.parametrize(
    ("kind", "extractor", "n", "name"),
    [
        ("fd", "inception", 50_000, "fid_50k"),
        ("sfd", "inception", 50_000, "sfid_50k"),
        ("is", "inception", 50_000, "is_50k"),
        ("kid", "inception", 50_000, "kid_50k"),
        ("precision", "inception", 50_000, "precision_50k"),
        ("recall", "inception", 50_000, "recall_50k"),
        ("fd_infinity", "inception", 50_000, "fid_infinity_50k"),
        ("coverage", "dinov2-vit-l-14", 50_000, "coverage_dinov2_vit_l_14_50k"),
        ("fd", "efficientnet-lite0", 1000, "fd_efficientnet_lite0_1k"),
        ("is", "efficientnet-lite0", 1500, "is_efficientnet_lite0_1500"),
        ("fd", "inception-0a1b2c3d", 297, "fd_inception_0a1b2c3d_297"),
        ("ratio_fd", "inception", 50_000, "ratio_fid_50k"),
        ("ratio_sfd", "inception", 10_000, "ratio_sfid_10k"),
        ("ratio_fd", "dinov2-vit-l-14", 297, "ratio_fd_dinov2_vit_l_14_297"),
    ],
)
def test_metric_names_carry_extractor_and_count(kind, extractor, n, name):
    assert metric_name(kind, extractor, n) == name


@pytest.mark.parametrize("extractor", ["inception", "efficientnet-lite0", "inception-0a1b2c3d", "dinov2-vit-s-14"])
@pytest.mark.parametrize("kind", [*METRIC_KINDS, *(f"ratio_{kind}" for kind in METRIC_KINDS)])
def test_metric_names_can_be_taken_apart(kind, extractor):
    for n in (297, 1500, 50_000):
        name = metric_name(kind, extractor, n)
        assert (parts := parse_metric_name(name)).kind.name == kind and parts.num_samples == n
        assert name == f"{parts.stem}_{format_count(n)}"
        assert is_of_extractor(name, extractor) and not is_of_extractor(name, "vgg")
        assert parts.kind.higher_is_better == METRIC_KINDS[kind.removeprefix("ratio_")].higher_is_better


def test_the_name_of_a_mean_over_extractors_is_that_of_none():
    assert (mean_ratio_name(50_000), mean_ratio_name(297)) == ("fdr_50k", "fdr_297")
    parts = parse_metric_name("fdr_50k")
    assert (parts.stem, parts.num_samples, parts.kind.name) == ("fdr", 50_000, "fdr")
    assert not parts.kind.higher_is_better
    assert not any(is_of_extractor("fdr_50k", extractor) for extractor in ("inception", "efficientnet-lite0"))


@pytest.mark.parametrize(
    "name",
    [
        "fid",
        "loss_50k",
        "fid_50m",
        "fido_50k",
        "",
        "fdr",
        "fdr_x_50k",
        "ratio_50k",
        "ratio_fdr_50k",
        "ratio_ratio_fid_1k",
    ],
)
def test_other_names_are_not_metrics(name):
    with pytest.raises(ValueError, match=f"metric name '{name}', expected a name such as fid_50k"):
        parse_metric_name(name)


def test_unknown_metric_kind_is_refused():
    with pytest.raises(ValueError, match="'fid'.*expected one of fd, fd_infinity, sfd"):
        metric_name("fid", "inception", 1000)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_one_entry_in_the_table_makes_a_metric(monkeypatch, higher_is_better):
    """Its names are given and parsed, reports hold it, and page, table, comparison and ranking know it."""
    kind = MetricKind(name="novelty", label="novelty <of>", higher_is_better=higher_is_better, published_name="fnov")
    monkeypatch.setitem(metric_names.METRIC_KINDS, kind.name, kind)
    names = [metric_name("novelty", extractor, 1000) for extractor in ("inception", "efficientnet-lite0")]
    assert names == ["fnov_1k", "novelty_efficientnet_lite0_1k"]
    assert [parse_metric_name(name).kind for name in names] == [kind, kind]
    assert parse_metric_name(names[0]).kind.higher_is_better == higher_is_better
    report = EvaluationReport(
        protocol=EvaluationProtocol(decoder="aa", extractor="inception", extractor_sha256="bb", reference_digest="cc"),
        checkpoint="out/step_1",
        checkpoint_digest="dd",
        metrics={"fid_1k": 2.0, "fnov_1k": 0.625},
    )
    assert f"novelty &lt;of&gt; {'↑' if higher_is_better else '↓'}<br><code>fnov</code>" in render_page(report)
    assert report.table().splitlines()[2].split() == ["fnov", "0.625"]
    assert compare_reports([report, report]).table().splitlines()[2].split() == ["fnov_1k", "0.625", "0.625"]
    assert EvaluationReport.from_json(report.to_json()) == report
