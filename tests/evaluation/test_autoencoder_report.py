"""Reports on autoencoders: their ids, files, tables and pages."""

import json
from dataclasses import replace

import pytest

from evaluation.autoencoder_report import (
    AutoencoderProtocol,
    AutoencoderReport,
    compare_autoencoders,
    describe_metric,
    reconstruction_distance_name,
    short_names,
)
from evaluation.pages.autoencoder_page import render_autoencoder_page
from raydit.errors import InvalidInput

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def report():
    protocol = AutoencoderProtocol(
        images_digest="f" * 64,
        image_size=32,
        crop="adm",
        num_images=1000,
        autoencoder="a" * 64,
        autoencoder_config="c" * 64,
        denoising="a DiT",
        extractors={"efficientnet-lite0": "e" * 64, "inception": "d" * 64},
    )
    metrics = {"psnr": 30.25, "ssim": 0.9, "rfd_efficientnet_lite0_1k": 5.5, "rfid_1k": 2.0, "bytes_per_image": 1024.0}
    channels = {"mean": [0.1, 0.2], "std": [1.0, 2.0], "kurtosis": [0.0, 3.0]}
    return AutoencoderReport(
        protocol=protocol,
        autoencoder="outputs/a/<autoencoder>",
        kind="AutoencoderKL",
        moments_shape=(8, 8, 8),
        metrics={**metrics, "latent_std": 1.1},
        channels=channels,
        device="one CPU",
        images="digits",
        warnings=["few <images>"],
        timings={"images_seconds": 2.0},
    )


@pytest.fixture
def other(report):
    protocol = replace(report.protocol, autoencoder="b" * 64, dtype="bfloat16")
    metrics = {"psnr": 28.0, "ssim": 0.9, "rfid_1k": 1.0, "bytes_per_image": 512.0, "latent_std": 0.9}
    return replace(report, protocol=protocol, autoencoder="outputs/b/autoencoder", metrics=metrics, device="a GPU")


def test_protocols_are_told_apart_by_every_field_and_compared_without_the_autoencoder(report, other):
    first = report.protocol
    assert first.protocol_id != other.protocol.protocol_id
    assert first.comparable_id == other.protocol.comparable_id
    changes = {"images_digest": "0", "image_size": 16, "crop": "resize", "num_images": 5, "seed": 1}
    changes |= {"uint8_rule": "round", "denoising": "a UViT", "extractors": {"inception": "d" * 64}}
    for name, value in changes.items():
        changed = replace(first, **{name: value})
        assert changed.protocol_id != first.protocol_id and changed.comparable_id != first.comparable_id, name
    assert replace(first, autoencoder_config="0").protocol_id != first.protocol_id


def test_a_report_is_read_as_it_was_written_and_not_if_it_was_edited(report):
    text = report.to_json()
    assert AutoencoderReport.from_json(text) == report
    assert json.loads(text)["protocol_id"] == report.protocol.protocol_id
    for edit, message in (
        (lambda values: values["protocol"].update(seed=1), "edited"),
        (lambda values: values["metrics"].update(luck=1.0), "luck"),
        (lambda values: values.pop("kind"), "no report on an autoencoder"),
        (lambda values: values["metrics"].update(psnr=float("nan")), "found nan in metrics.psnr, expected finite"),
        (lambda values: values["artifacts"].update(page="../../page.html"), "page.html"),
    ):
        values = json.loads(text)
        edit(values)
        with pytest.raises(InvalidInput, match=message):
            AutoencoderReport.from_json(json.dumps(values))


def test_names_of_metrics_carry_extractor_and_number():
    assert reconstruction_distance_name("inception", 50_000) == "rfid_50k"
    assert reconstruction_distance_name("efficientnet-lite0", 297) == "rfd_efficientnet_lite0_297"
    assert describe_metric("rfid_50k").higher_is_better is False
    assert describe_metric("psnr").arrow == "↑" and describe_metric("latent_std").arrow == ""
    for name in ("recall_50k", "rprecision_50k", "fid_50k", "rubbish"):
        with pytest.raises(InvalidInput):
            describe_metric(name)


def test_a_table_marks_the_best_values(report, other):
    lines = compare_autoencoders([report, other]).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["metric"] == ["a/<autoencoder>", "b/autoencoder"]
    assert cells["psnr"] == ["30.25", "*", "28"] and cells["rfid_1k"] == ["2", "1", "*"]
    assert cells["ssim"] == ["0.9", "*", "0.9", "*"] and cells["bytes_per_image"] == ["1024", "512", "*"]
    assert cells["latent_std"] == ["1.1", "0.9"]
    assert "different devices" in lines[-1]
    assert "*" not in report.table()
    with pytest.raises(InvalidInput, match="num_images"):
        compare_autoencoders([report, replace(other, protocol=replace(other.protocol, num_images=10))])


def test_short_names_are_unique(report):
    assert short_names([report, report]) == ["<autoencoder> (1)", "<autoencoder> (2)"]
    assert short_names([report]) == ["outputs/a/<autoencoder>"]
    deeper = replace(report, autoencoder="outputs/a")
    assert short_names([report, deeper]) == ["a/<autoencoder>", "a"]


def test_a_page_escapes_text_and_shows_everything(report, other):
    html = render_autoencoder_page([report, other], PNG)
    assert "<autoencoder>" not in html and "few &lt;images&gt;" in html
    assert "<strong>30.25</strong>" in html and "data:image/png;base64" in html
    assert report.protocol.protocol_id in html and other.protocol.protocol_id in html
    assert "structural similarity ↑" in html and "8 x 8 x 8" in html
    alone = render_autoencoder_page([report])
    assert "<strong>" not in alone and "data:image" not in alone.split("</style>")[1]
    many = replace(report, channels={name: [0.0] * 768 for name in report.channels})
    assert "The first 32 of 768 channels" in render_autoencoder_page([many])
    with pytest.raises(ValueError, match="PNG"):
        render_autoencoder_page([report], b"GIF8")
