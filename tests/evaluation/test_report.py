"""Reports survive storage and read well."""

import json
from dataclasses import replace
from html import escape
from math import inf, nan
from pathlib import Path
from zipfile import ZipFile

import pytest

from evaluation.explanations import explain_low_precision
from evaluation.merge_reports import merge_reports
from evaluation.pages.report_page import render_page
from evaluation.per_class import ClassDistance
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from raydit.errors import InvalidInput

REPORT = EvaluationReport(
    protocol=EvaluationProtocol(
        decoder="sha256:aa",
        extractor="efficientnet-lite0",
        extractor_sha256="bb",
        reference_digest="cc",
        cfg_interval=(0.1, 0.8),
    ),
    checkpoint="outputs/digits/checkpoints/step_0002000",
    checkpoint_digest="dd",
    metrics={"fd_efficientnet_lite0_1k": 12.3456789, "is_efficientnet_lite0_1k": 2.5},
    errors={"is_efficientnet_lite0_1k": 0.0625},
    real_baseline={"fd_efficientnet_lite0_297": 4.5, "is_efficientnet_lite0_297": 2.75},
    curve=[(500, 14.5), (1000, 12.3456789)],
    warnings=["few images"],
    timings={"sample": 30.5},
    artifacts={"grid": "grid.png"},
)


def test_a_report_survives_storage():
    assert EvaluationReport.from_json(REPORT.to_json()) == REPORT


def test_distances_of_classes_are_kept_and_shown_for_each_extractor():
    def classes(value):
        known = ClassDistance(name="cat<", num_samples=40, num_real=30, metric="kid", value=value)
        return [known, ClassDistance(name="dog", num_samples=3, num_real=30, reason="3 samples, and at least 10")]

    other = replace(
        REPORT,
        protocol=replace(REPORT.protocol, extractor="timm:resnet50.a1_in1k", extractor_preprocessing="scale 1"),
        metrics={"fd_timm_resnet50_a1_in1k_1k": 1.0},
        errors={},
        real_baseline={},
        per_class=classes(0.25),
    )
    merged = merge_reports([replace(REPORT, per_class=classes(0.5)), other])
    assert EvaluationReport.from_json(merged.to_json()) == merged
    assert [part.per_class for part in merged.parts] == [classes(0.5), classes(0.25)]
    page = render_page(merged)
    assert "Distance of each class, timm:resnet50.a1_in1k" in page and "cat&lt;" in page and "at least 10" in page
    assert "per_class" not in merge_reports([REPORT, replace(other, per_class=[])]).to_json()


def test_a_report_older_than_curves_is_read():
    values = json.loads(REPORT.to_json())
    del values["curve"]
    assert EvaluationReport.from_json(json.dumps(values)) == replace(REPORT, curve=[])


def test_a_report_that_an_older_commit_wrote_is_written_back_to_the_byte():
    with ZipFile(Path(__file__).resolve().parents[1] / "golden" / "707a9da" / "artifacts.zip") as golden:
        (file,) = (name for name in golden.namelist() if name.endswith("/report.json"))
        text = golden.read(file).decode()
    report = EvaluationReport.from_json(text)
    assert report.to_json() == text
    assert report.real_baseline == json.loads(text)["floor"] != {}


def test_a_report_names_its_protocol():
    assert f'"protocol_id": "{REPORT.protocol_id}"' in REPORT.to_json()
    assert REPORT.protocol_id == REPORT.protocol.protocol_id


def test_an_edited_protocol_is_noticed():
    edited = REPORT.to_json().replace('"cfg_scale": 1.0', '"cfg_scale": 1.5')
    with pytest.raises(ValueError, match=f"expected the recorded {REPORT.protocol_id}.*edited.*again"):
        EvaluationReport.from_json(edited)


def test_table_shows_the_real_baseline_next_to_the_metrics():
    assert REPORT.table() == (
        "metric                 generated (N = 1k)  real images (N = 297)\n"
        "fd_efficientnet_lite0  12.3457             4.5\n"
        "is_efficientnet_lite0  2.5 +- 0.0625       2.75\n"
        "Frechet distance falls as N grows: compare only columns of equal N.\n"
    )


def test_table_without_a_real_baseline_has_two_columns():
    report = EvaluationReport(
        protocol=REPORT.protocol, checkpoint="c", checkpoint_digest="d", metrics={"fid_50k": 2.27}
    )
    assert report.table() == "metric  generated (N = 50k)\nfid     2.27\n"


def test_repeats_survive_storage_and_give_the_estimate():
    name = "fd_efficientnet_lite0_1k"
    repeated = replace(REPORT, repeats={name: [12.0, 14.0, 13.0]})
    assert EvaluationReport.from_json(repeated.to_json()) == repeated
    assert repeated.estimate(name) == (13.0, pytest.approx(1 / 3**0.5))
    assert REPORT.estimate(name) == (12.3456789, None)
    assert REPORT.estimate("is_efficientnet_lite0_1k") == (2.5, 0.0625)
    assert REPORT.headline == name


def test_the_table_gives_the_mean_over_seeds():
    name = "fd_efficientnet_lite0_1k"
    first, second = replace(REPORT, repeats={name: [12.0, 14.0]}, real_baseline={}).table().splitlines()[:2]
    assert first.split("  ")[-1].strip() == "mean of 2 seeds" and second.endswith("13 +- 1")


def test_a_metric_that_could_not_be_computed_is_null_with_its_reason():
    plain = REPORT.to_json()
    assert "missing" not in plain and "disqualified" not in plain
    report = replace(REPORT, missing={"recall_50k": "3 real images, and more than 5 are needed"})
    content = json.loads(report.to_json())
    assert content["metrics"] == {**REPORT.metrics, "recall_50k": None}
    assert content["missing"] == {"recall_50k": "3 real images, and more than 5 are needed"}
    assert EvaluationReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("code", "commit"),
    [
        ({"commit": "0123456789abcdef", "dirty": False}, "0123456789ab"),
        ({"commit": "0123456789abcdef", "dirty": True}, "0123456789ab with uncommitted changes"),
        (None, ""),
    ],
)
def test_a_report_names_the_code_that_scored_and_one_without_it_is_as_before(code, commit):
    report = replace(REPORT, code=code)
    text = report.to_json()
    assert EvaluationReport.from_json(text) == report and report.commit == commit
    assert ("code" in json.loads(text)) == (code is not None)
    assert commit in render_page(report) and ("· code" in render_page(report)) == bool(commit)


def test_a_report_says_when_and_of_what_it_is_and_one_without_it_is_as_before():
    fields = {
        "date": "2026-03-01T12:00:00+00:00",
        "raydit_version": "1.2.3",
        "latents": "f" * 64,
        "model": "DiT-S/2, flow",
    }
    assert not fields.keys() & json.loads(REPORT.to_json()).keys()
    report = replace(REPORT, **fields)
    assert fields.items() <= json.loads(report.to_json()).items()
    again = EvaluationReport.from_json(report.to_json())
    assert again == report and again.date == report.date
    line = "2026-03-01 12:00:00 UTC · raydit 1.2.3 · DiT-S/2, flow · latents <code>ffffffffffff</code>"
    assert line in render_page(report)


@pytest.mark.parametrize(
    ("num_samples", "precision", "said"),
    [
        (1000, 0.0, "Precision near 0: look at the samples. If they are unlike the real images"),
        (100, 0.0, "Precision near 0 may be due to the number of samples: 100"),
        (1000, 0.5, ""),
    ],
)
def test_a_precision_near_0_is_explained(num_samples, precision, said):
    protocol = replace(REPORT.protocol, num_samples=num_samples)
    count = "1k" if num_samples == 1000 else num_samples
    metrics = {f"fd_efficientnet_lite0_{count}": 1.0, f"precision_efficientnet_lite0_{count}": precision}
    report = replace(REPORT, protocol=protocol, metrics=metrics, real_baseline={})
    explanation = explain_low_precision(report.metrics, report.protocol)
    assert explanation.startswith(said) and bool(explanation) == bool(said)
    assert ("If they look good, the features of efficientnet-lite0 do not fit these images" in explanation) == (
        num_samples == 1000 and precision == 0.0
    )
    assert explanation in report.table()
    assert escape(explanation) in render_page(report)


@pytest.mark.parametrize(
    "change",
    [
        {"artifacts": {"samples": "../../private.png"}},
        {"artifacts": {"samples": "/etc/passwd"}},
        {"checkpoint_digest": "../../x"},
    ],
)
def test_a_report_names_files_of_its_own_folder_only(change):
    """They are drawn into its page, sent to MLflow and renamed when another report takes its place."""
    content = json.dumps({**json.loads(REPORT.to_json()), **change})
    with pytest.raises(InvalidInput, match=r"report.json: found .* expected names of files in its own folder"):
        EvaluationReport.from_json(content)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"protocol_id": "x", "metrics": 5}'])
def test_what_is_no_report_is_told(content):
    with pytest.raises(InvalidInput, match=r"report.json: found no report .*Evaluate the checkpoint again"):
        EvaluationReport.from_json(content)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"metrics": {REPORT.headline: nan}}, f"nan in metrics.{REPORT.headline}"),
        ({"errors": {REPORT.headline: inf}}, f"inf in errors.{REPORT.headline}"),
        ({"floor": {REPORT.headline: -inf}}, f"-inf in floor.{REPORT.headline}"),
        ({"repeats": {REPORT.headline: [1.0, nan]}}, f"nan in repeats.{REPORT.headline}.1"),
        ({"curve": [[500, nan]]}, "nan in curve.0.1"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_the_names_of_file_and_field(change, found):
    """Python's parser takes them for JSON, and its writer refused them only after the scores were printed."""
    content = json.dumps({**json.loads(REPORT.to_json()), **change})
    with pytest.raises(InvalidInput, match=f"b/report.json: found {found}, expected finite numbers. Evaluate"):
        EvaluationReport.from_json(content, "b/report.json")


def test_numbers_that_are_too_large_are_not_finite():
    content = REPORT.to_json().replace("30.5", "1e999")
    with pytest.raises(InvalidInput, match=r"report.json: found inf in timings.sample, expected finite"):
        EvaluationReport.from_json(content)


def test_the_shares_of_autoencoder_and_model_are_those_at_the_largest_common_n():
    report = replace(
        REPORT,
        metrics={"fd_efficientnet_lite0_1k": 6.0, "fd_efficientnet_lite0_340": 8.0},
        real_baseline={"fd_efficientnet_lite0_340": 3.5, "fd_efficientnet_lite0_200": 4.5},
        reconstructions={"fd_efficientnet_lite0_340": 6.75, "fd_efficientnet_lite0_200": 8.5},
    )
    assert report.explanations == [
        "Of the Frechet distance of 8 at N = 340, 3.5 is that of real images, 3.25 comes from the autoencoder and 1.25 "
        "from the model."
    ]
    assert report.explanations[0] in report.table() and report.explanations[0] in render_page(report)
    assert replace(report, reconstructions={}).explanations == []
