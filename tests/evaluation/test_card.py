"""A card is plain data that says when it was edited; its scores hold where a second evaluation gives them again."""

import json
import math
from dataclasses import fields, replace

import pytest

from evaluation.card import CheckpointFacts, EvaluationCard, LatentsFacts
from evaluation.pages.card_text import render_card
from evaluation.per_class import ClassDistance
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from evaluation.verification import ROUNDING, check_scores, verification_table
from raydit.errors import InvalidInput

PROTOCOL = EvaluationProtocol(
    num_samples=200,
    decoder="d" * 64,
    extractor="efficientnet-lite0",
    extractor_sha256="e" * 64,
    reference_digest="r" * 64,
)
FD = "fd_efficientnet_lite0_200"
REPORT = EvaluationReport(
    protocol=PROTOCOL,
    checkpoint="/x/checkpoints/step_0000004",
    checkpoint_digest="c" * 64,
    metrics={FD: 0.1 + 0.2, "precision_efficientnet_lite0_200": 0.5},
    errors={FD: 0.02},
    real_baseline={FD: 1 / 3},
    repeats={FD: [0.1 + 0.2, 0.31]},
    warnings=["N is small"],
    artifacts={"page": "report.html"},
    code={"commit": "a" * 40, "dirty": False},
    date="2026-01-02T03:04:05+00:00",
    raydit_version="1.2",
)
CARD = EvaluationCard(
    report=replace(REPORT, artifacts={}),
    checkpoint=CheckpointFacts(
        uri="/x/checkpoints/step_0000004",
        digest="c" * 64,
        step=4,
        model="DiT-S/2 | <b>, flow",
        parameters=1234,
        bytes=5678,
        files={"ema.safetensors": "f" * 64},
    ),
    latents=LatentsFacts(fingerprint="l" * 64, path="/x/latents", images=10, quarantined=1, autoencoder="vae"),
    recipe={"name": "x", "seed": 0, "evaluate": {"cfg_interval": None}},
    environment={"torch": "2.9", "hardware": "2 CPU cores"},
    command="raydit evaluate /x/checkpoints/step_0000004 --recipe recipe.toml",
    date="2026-01-03T00:00:00+00:00",
)


def test_a_card_is_read_as_it_was_written_to_the_bit():
    read = EvaluationCard.from_json(CARD.to_json())
    assert read == CARD and read.report.metrics[FD] == 0.1 + 0.2
    assert read.digest == CARD.digest == json.loads(CARD.to_json())["digest"]
    assert read.num_seeds == 2 and json.loads(CARD.to_json())["format"] == "raydit.card"


def edited(change, *, sign=False):
    content = json.loads(CARD.to_json())
    change(content)
    if sign:
        import hashlib

        rest = {name: value for name, value in content.items() if name != "digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(content)


def test_an_edited_card_is_refused():
    def lower(content):
        content["report"]["metrics"][FD] = 0.1

    with pytest.raises(InvalidInput, match="the card was edited"):
        EvaluationCard.from_json(edited(lower))
    # With a digest that fits, only computing the scores again finds it out.
    assert EvaluationCard.from_json(edited(lower, sign=True)).report.metrics[FD] == 0.1


def test_a_protocol_that_does_not_fit_its_id_is_refused_whatever_the_digest():
    def fewer(content):
        content["report"]["protocol"]["num_samples"] = 100

    with pytest.raises(InvalidInput, match="the report was edited"):
        EvaluationCard.from_json(edited(fewer, sign=True))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "raydit.card", "version": 2}', '{"format": "raydit.card", "version": 1}', "[" * 5000],
    ids=["nothing", "list", "no format", "later version", "no content", "deep"],
)
def test_what_is_no_card_is_refused(text):
    with pytest.raises(InvalidInput, match="card"):
        EvaluationCard.from_json(text, "card.json")


def test_the_page_states_scores_protocol_checkpoint_and_commands():
    page = render_card(CARD)
    assert page.startswith("# Scores of DiT-S/2 \\| \\<b\\>, flow\n")
    table = [line for line in page.splitlines() if line.startswith("| fd\\_efficientnet\\_lite0\\_200")]
    assert table == ["| fd\\_efficientnet\\_lite0\\_200 | 0.3 ± 0.02 | 0.305 ± 0.005 | 0.333333 |"]
    for field in fields(PROTOCOL):  # those that are not set as well
        assert f"| {field.name.replace('_', chr(92) + '_')} |" in page
    for text in (PROTOCOL.protocol_id, "c" * 64, "l" * 64, "1,234", "10, and 1 quarantined", "2 CPU cores", "a" * 12):
        assert text in page
    assert f"    {CARD.command}\n" in page and "    raydit verify card.json\n" in page


def scored(**changes):
    return replace(REPORT, **changes)


@pytest.mark.parametrize(
    ("stated", "found", "error", "verdict"),
    [
        (2.0, 2.0, None, "equal"),
        (2.0, math.nextafter(2.0, 3.0), None, "rounding"),
        (2.0, 2.0 * (1 + 0.9 * ROUNDING), None, "rounding"),
        (2.0, 2.0 * (1 + 1.1 * ROUNDING), None, "differs"),
        (2.0, 2.1, 0.08, "error"),  # the combined error of both is 0.113
        (2.0, 2.12, 0.08, "differs"),
        (2.0, None, 0.08, "missing"),
        (0.0, 1e-9, None, "differs"),
    ],
)
def test_a_score_holds_if_it_is_equal_within_rounding_or_errors(stated, found, error, verdict):
    errors = {} if error is None else {FD: error}
    first = scored(metrics={FD: stated}, errors=errors, repeats={}, real_baseline={})
    again = replace(first, metrics={} if found is None else {FD: found})
    check, *_ = check_scores(first, again)
    assert (check.name, check.verdict, check.holds) == (FD, verdict, verdict in ("equal", "rounding", "error"))


@pytest.mark.parametrize(
    ("stated", "verdict"), [(200.0, "differs"), (0.001, "differs"), (2.4, "error"), (2.0, "equal")]
)
def test_the_errors_on_a_card_are_checked_and_decide_nothing(stated, verdict):
    honest = scored(metrics={FD: 110.0}, errors={FD: 2.0}, repeats={}, real_baseline={})
    score, error = check_scores(replace(honest, metrics={FD: 90.0}, errors={FD: stated}), honest)
    assert score.verdict == "differs" and score.error == pytest.approx(2 * 2**0.5)
    assert (error.name, error.verdict) == (f"{FD}, error", verdict)


@pytest.mark.parametrize(
    ("kind", "std", "stated", "verdict"),
    [
        ("is", 0.4, 6.0 + 0.9 * 0.4 / 9**0.5 * 2**0.5, "error"),
        ("is", 0.4, 6.0 + 1.1 * 0.4 / 9**0.5 * 2**0.5, "differs"),
        ("kid", 0.01, 6.0 + 0.009, "differs"),
        ("kid", 0.01, 6.0 + 0.9 * ROUNDING * 6, "rounding"),
    ],
)
def test_standard_deviations_are_not_taken_for_standard_errors(kind, std, stated, verdict):
    """The Inception Score is a mean over ten parts; no standard error of a kernel distance is known."""
    name = f"{kind}_efficientnet_lite0_200"
    honest = scored(metrics={name: 6.0}, errors={name: std}, repeats={}, real_baseline={})
    check, _ = check_scores(replace(honest, metrics={name: stated}), honest)
    assert check.verdict == verdict


def test_a_score_near_zero_is_rounded_by_its_spread():
    name = "kid_efficientnet_lite0_200"
    honest = scored(metrics={name: 2e-5}, errors={name: 0.01}, repeats={}, real_baseline={name: -3e-5})
    stated = replace(honest, metrics={name: 2.5e-5}, real_baseline={name: -2e-5})
    assert [check.verdict for check in check_scores(stated, honest)] == ["rounding", "equal", "rounding"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_card_with_a_number_that_is_none_is_refused(number):
    values = json.loads(CARD.to_json())
    values["report"]["metrics"][FD] = "HERE"
    with pytest.raises(InvalidInput, match="card.json: found no card"):
        EvaluationCard.from_json(json.dumps(values).replace('"HERE"', number))


def test_every_number_of_a_card_is_compared():
    again = scored(repeats={FD: [0.3, 0.4]}, real_baseline={FD: 0.5})
    checks = {check.name: check.verdict for check in check_scores(REPORT, again)}
    assert checks == {
        FD: "equal",
        "precision_efficientnet_lite0_200": "equal",
        f"{FD}, error": "equal",
        f"{FD}, seed 1": "differs",
        f"{FD}, real images": "differs",
    }
    cat, dog = (
        ClassDistance(name=name, num_samples=5, num_real=9, metric="kid", value=value)
        for name, value in (("cat", 0.5), ("dog", None))
    )
    of_classes = check_scores(scored(per_class=[cat, dog]), scored(per_class=[replace(cat, value=0.6), dog]))
    assert (of_classes[-1].name, of_classes[-1].verdict) == ("kid of class cat, efficientnet-lite0", "differs")
    assert len(of_classes) == len(check_scores(REPORT, REPORT)) + 1
    fewer = check_scores(REPORT, scored(repeats={}, real_baseline={}))
    assert [check.verdict for check in fewer] == ["equal", "equal", "equal", "missing", "missing"]
    assert "MISSING" in verification_table(fewer) and "0.3 +- 0.0283" in verification_table(fewer)
