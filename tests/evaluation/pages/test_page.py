"""The page shows the report, needs nothing else, and lets no text of the report act as markup."""

import base64
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from evaluation.pages.report_page import render_page
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
REPORT = EvaluationReport(
    protocol=EvaluationProtocol(
        decoder="sha256:aa", extractor="inception", extractor_sha256="bb", reference_digest="cc", cfg_scale=1.5
    ),
    checkpoint="outputs/imagenet/checkpoints/step_0400000",
    checkpoint_digest="dd" * 32,
    metrics={"fid_50k": 2.2741, "fid_infinity_50k": 2.2312, "is_50k": 278.24, "precision_50k": 0.83, "fid_10k": 4.115},
    errors={"fid_50k": 0.0312, "is_50k": 3.2},
    real_baseline={"fid_10k": 1.938},
    curve=[(n, 2.2312 + 2145 / n) for n in range(5000, 50_001, 5000)],
    warnings=["only a few images"],
    timings={"features_seconds": 3612.25, "scoring_seconds": 42.5},
)
HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser sees them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_shows_the_report():
    page = Page(render_page(REPORT, {"samples": PNG}))
    assert page.open == []
    shown = ["step_0400000", REPORT.protocol_id, "2.274 ± 0.0312", "278.2 ± 3.2", "0.83", "4.115", "1.938"]
    shown += [
        "only a few images",
        "3,612.2 s",
        "cfg_scale",
        "1.5",
        "N → ∞: 2.231",
        "N = 50k",
        "real images",
        "sha256:aa",
    ]
    assert [text for text in shown if text not in page.text] == []


def test_the_page_needs_nothing_else():
    """No address in it, and a policy that would forbid to load one."""
    html = render_page(REPORT, {"samples": PNG, "neighbours": PNG})
    page = Page(html)
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "video", "form"})
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]


def test_images_are_embedded_unchanged():
    page = Page(render_page(REPORT, {"samples": PNG, "neighbours": PNG, "own name": PNG}))
    sources = [image["src"].removeprefix("data:image/png;base64,") for image in page.all("img")]
    assert [base64.b64decode(source) for source in sources] == [PNG] * 3
    assert [image["alt"] for image in page.all("img")] == ["Samples", "Nearest training images", "own name"]
    with pytest.raises(ValueError, match="image 'grid' that begins with b'<svg', expected a PNG"):
        render_page(REPORT, {"grid": b"<svg"})


def test_no_text_of_a_report_acts_as_markup():
    hostile = replace(
        REPORT,
        protocol=replace(REPORT.protocol, decoder=HOSTILE, sampler=HOSTILE),
        checkpoint=f"out/{HOSTILE}",
        checkpoint_digest=HOSTILE,
        warnings=[HOSTILE],
        timings={HOSTILE: 1.0},
    )
    page = Page(render_page(hostile, {HOSTILE: PNG}))
    assert page.open == [] and page.all("script") == []
    assert page.text.count(HOSTILE) >= 6
    assert [image["alt"] for image in page.all("img")] == [HOSTILE]


def test_a_report_with_one_number_is_a_page():
    plain = replace(REPORT, metrics={"fid_50k": 2.0}, errors={}, real_baseline={}, curve=[], warnings=[], timings={})
    page = Page(render_page(plain))
    assert page.all("svg") == [] and page.all("img") == [] and page.open == []


def test_without_a_curve_the_distances_of_several_n_are_drawn():
    page = Page(render_page(replace(REPORT, curve=[])))
    titles = [text for text in ("samples, N = 10k: 4.115", "samples, N = 50k: 2.2741") if text in page.text]
    assert len(titles) == 2 and "fit" not in [group.get("id") for group in page.all("g")]


def test_pictures_of_given_images_say_which_these_are():
    """They are spread over the source, and named by their numbers in it."""
    pictures = {"samples": PNG, "neighbours": PNG}
    given = replace(REPORT, protocol=replace(REPORT.protocol, sampler="unknown"))
    drawn, images = (Page(render_page(report, pictures)).text for report in (REPORT, given))
    assert "The first of the scored samples." in drawn and "The first of" not in images
    assert "evenly spaced in their source" in images and "with their number in the source" in images
