"""Protocols in files: an evaluation by one has its id, or is refused."""

import hashlib
import json
from dataclasses import replace

import pytest
from fakes import FakeContext
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.extractors import ExtractorIdentity, identify_extractor
from pipelines.checkpoints.open import open_checkpoint
from pipelines.evaluate import evaluate
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol, evaluation_protocols
from pipelines.scoring.protocols.protocol_file import (
    by_protocol_file,
    check_given_protocol,
    overruled_fields,
    protocol_file,
    read_protocols,
    with_protocols,
)
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput, NotFound


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    config = tiny_output(tmp_path_factory.mktemp("output"), "evaluate.num_samples=10")
    return open_checkpoint(write_checkpoint(config, 2).path)


@pytest.fixture(scope="module")
def other(opened):
    """A protocol that differs from the checkpoint's recipe in all that samples depend on."""
    config = checkpoint_recipe(opened)
    evaluate = replace(
        config.evaluate,
        num_samples=20,
        sampler="heun",
        sampling_steps=3,
        cfg_scale=2.5,
        cfg_interval=(0.1, 0.7),
        weights="raw",
        labels="random",
        time_shift=2.0,
        dtype="bfloat16",
    )
    return evaluation_protocol(
        ScoringSettings.from_recipe(replace(config, seed=7, random="counter", evaluate=evaluate)), opened
    )


def test_an_evaluation_by_a_file_has_its_protocol(opened, other, tmp_path):
    file = tmp_path / "protocol.json"
    file.write_bytes(protocol_file([other]))
    config = by_protocol_file(str(file), checkpoint_recipe)(opened)
    assert evaluation_protocol(ScoringSettings.from_recipe(config), opened) == other
    assert (config.seed, config.random) == (7, "counter")


def test_a_report_serves_as_well(other, tmp_path):
    file = tmp_path / "report.json"
    further = replace(other, extractor="inception", extractor_sha256="f" * 64)
    report = {"metrics": {}, "protocol_id": other.protocol_id, "protocol": other.to_dict()}
    file.write_text(json.dumps({**report, "further": [{"protocol": further.to_dict(), "curve": []}]}))
    assert read_protocols(str(file)) == [other, further]
    file.write_bytes(protocol_file([other, further]))
    assert read_protocols(str(file)) == [other, further]


def test_extractors_are_those_of_the_file_in_its_order(opened, other):
    further = replace(other, extractor="inception-0123abcd", extractor_sha256="0123abcd" * 8)
    config = with_protocols(checkpoint_recipe(opened), [further, other])
    assert [each.extractor for each in config.evaluate.for_each_extractor()] == ["inception", other.extractor]
    assert with_protocols(checkpoint_recipe(opened), [other]).evaluate.extractors == ()


FOLDER = "transformers:/models/vit"


@pytest.fixture
def model_folder(monkeypatch):
    """A folder of transformers, of which protocols record the last part of the path and a digest."""

    def identify(name, weights=None):
        if name.removeprefix("transformers:") == "gone":
            raise NotFound("no files", "a folder", "copy it")
        known = ExtractorIdentity("transformers:vit-abababab", "ab" * 32, "resize")
        return known if name == FOLDER else identify_extractor(name, weights)

    monkeypatch.setattr("pipelines.scoring.settings.identify_extractor", identify)


def scored_by(config, **settings):
    return replace(config, evaluate=replace(config.evaluate, **settings))


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize("further", [(), ("efficientnet-lite0",)])
def test_a_recipe_that_names_a_folder_keeps_it(opened, further, tmp_path):
    names = (FOLDER, *further)
    config = scored_by(checkpoint_recipe(opened), extractor=names[0], extractors=names)
    settings = ScoringSettings.from_recipe(config)
    protocols = evaluation_protocols(settings, evaluation_protocol(settings, opened))
    file = tmp_path / "protocol.json"
    for order in (1, -1):
        file.write_bytes(protocol_file(protocols[::order]))
        found = by_protocol_file(str(file), lambda opened: config)(opened)
        assert [each.extractor for each in found.evaluate.for_each_extractor()] == list(names[::order])
    gone = scored_by(config, extractor="transformers:gone", extractors=("transformers:gone", *further))
    assert with_protocols(gone, protocols).evaluate.extractor == "transformers:vit"


def test_extractors_keep_their_weights_in_another_choice(opened, other, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    own = replace(other, extractor=f"inception-{sha256[:8]}", extractor_sha256=sha256)
    config = scored_by(checkpoint_recipe(opened), extractor="inception", extractor_weights=str(weights))
    assert with_protocols(config, [own]).evaluate.extractor_weights == str(weights)
    both = with_protocols(config, [other, own]).evaluate
    assert (both.extractors, both.extractor_weights) == ((other.extractor, "inception"), {"inception": str(weights)})
    timm = replace(other, extractor="timm:resnet50.a1-20230401", extractor_sha256="f" * 64)
    table = {timm.extractor: "resnet.safetensors", "inception": str(weights)}
    names = tuple(table)
    several = scored_by(config, extractor=names[0], extractors=names, extractor_weights=table)
    one = with_protocols(several, [own]).evaluate
    assert (one.extractor, one.extractors, one.extractor_weights) == ("inception", (), {"inception": str(weights)})
    assert with_protocols(several, [other]).evaluate.extractor_weights is None
    assert with_protocols(several, [own, timm]).evaluate.extractors == ("inception", timm.extractor)


def test_other_images_or_an_edited_file_are_refused(opened, other, tmp_path):
    file = tmp_path / "protocol.json"
    file.write_bytes(protocol_file([replace(other, reference_digest="f" * 64)]))
    with pytest.raises(InvalidInput, match=r"reference_digest.*expected.*Use the same real images"):
        by_protocol_file(str(file), checkpoint_recipe)(opened)
    content = json.loads(file.read_text())
    content["protocol"]["cfg_scale"] = 9.0
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="the file was edited"):
        read_protocols(str(file))


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_digest": "0" * 64},
        {"validation_digest": "0" * 64},
        {"decoder": "0" * 64},
        {"extractor": "inception"},
        {"extractor_sha256": "0" * 64},
        {"uint8_rule": "round"},
    ],
)
def test_a_report_never_names_a_protocol_that_was_not_used(opened, changes):
    config = checkpoint_recipe(opened)
    protocol = replace(evaluation_protocol(ScoringSettings.from_recipe(config), opened), **changes)
    (name,) = changes
    with pytest.raises(InvalidInput, match=f"{name} = .*of the given one, with {name} = .*leave out the protocol"):
        evaluate(opened, protocol, config=config, context=FakeContext())


def test_a_given_protocol_decides_how_samples_are_drawn(opened, other):
    settings = ScoringSettings.from_recipe(checkpoint_recipe(opened))
    check_given_protocol(other, settings, opened)
    unequal_size = replace(settings, images=replace(settings.images, size=32))
    with pytest.raises(InvalidInput, match="images.size: found 32"):
        check_given_protocol(other, unequal_size, opened)
    with pytest.raises(NotFound, match="ema_0.3"):
        check_given_protocol(replace(other, weights="ema_0.3"), settings, opened)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"protocol": {}}', '{"protocol": 3, "protocol_id": "x"}'])
def test_what_is_no_protocol_is_refused(tmp_path, content):
    file = tmp_path / "protocol.json"
    file.write_text(content)
    with pytest.raises(InvalidInput):
        read_protocols(str(file))
    with pytest.raises(NotFound):
        read_protocols(str(tmp_path / "none.json"))


@pytest.fixture
def file(other, tmp_path):
    path = tmp_path / "protocol.json"
    path.write_bytes(protocol_file([other]))
    return str(path)


def test_overrides_that_a_file_would_overrule_are_found(file):
    equal = ("random=counter", "evaluate.cfg_scale=2.5", "evaluate.cfg_interval=[0.1, 0.7]", "evaluate.num_workers=3")
    equal += ("evaluate.decoder_dtype=float32", "evaluate.autoguidance_weights=raw")  # what it implies
    assert overruled_fields(file, equal) == {}
    assert overruled_fields(file, ("seed=5", *equal, "evaluate.sampler=euler", "evaluate={labels='balanced'}")) == {
        "seed": 7,
        "evaluate.labels": "random",
    }
    assert overruled_fields(file, ("evaluate.cfg_scale=2", "evaluate.decoder_dtype='bfloat16'")) == {
        "evaluate.cfg_scale": 2.5,
        "evaluate.decoder_dtype": None,
    }


def test_a_field_that_a_file_would_overrule_is_bad_usage(raydit, file):
    code, out, err = raydit("evaluate", "nowhere", "--protocol", file, "--set", "seed=5")
    assert (code, out) == (2, "")
    assert "Error: --set seed: --protocol sets it to 7; leave out one of the two" in err


def test_an_extractor_that_a_file_would_overrule_is_refused(opened, other, file):
    for name in ("inception", other.extractor):
        overrides = (f"evaluate.extractor={name}",)
        recipe_of = by_protocol_file(file, lambda each, given=overrides: checkpoint_recipe(each, given), overrides)
        if name == other.extractor:
            assert recipe_of(opened).evaluate.extractor == name
            continue
        with pytest.raises(InvalidInput, match="--set evaluate.extractor: found 'inception' with .*, expected 'effic"):
            recipe_of(opened)
