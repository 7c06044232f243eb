"""The typed record of a checkpoint agrees with its config.json."""

import dataclasses
import json

import pytest

from dit.autoencoder import LatentScale
from dit.checkpoint import load_checkpoint
from dit.formats.record import AutoencoderRecord, CheckpointRecord, SourceRecord
from dit.objective import create_process
from raydit.errors import InvalidInput


def as_json(record):
    return json.loads(json.dumps(dataclasses.asdict(record)))


def test_the_record_has_the_values_of_the_config(small_model, save_model):
    model = small_model()
    checkpoint = load_checkpoint(save_model(model, recipe={"name": "tiny"}, latents_fingerprint="f1").path)
    record, config = checkpoint.record, dict(checkpoint.config)
    assert record.model_config == model.config and record.process_kind == "diffusion"
    assert record.autoencoder.scale == LatentScale((0.5, -1.0, 2.0, 0.0), (2.0, 0.25, 1.0, 4.0))
    assert (record.step, record.recipe, record.latents_fingerprint) == (3, {"name": "tiny"}, "f1")
    said = as_json(record)
    said["autoencoder"]["class"] = said["autoencoder"].pop("class_name")
    assert (config.pop("format"), config.pop("version")) == ("raydit.checkpoint", 1)
    assert (said.pop("source"), said.pop("start")) == (None, None)
    assert said == config


def test_the_origin_of_an_imported_checkpoint_is_recorded(small_model, save_model):
    source = {"format": "diffusers", "name": "pipe", "numerics": "official"}
    record = save_model(small_model(), source=source).record
    assert record.source == SourceRecord(format="diffusers", name="pipe", numerics="official")
    assert save_model(small_model(), "other", source={"format": "official", "name": "a.pt"}).record.source == (
        SourceRecord(format="official", name="a.pt")
    )


def test_a_record_does_not_need_the_optional_fields():
    autoencoder = {"id": "a", "class": "AutoencoderKL", "sha256": None, "latent_channels": 1, "downsample": 8}
    autoencoder |= {"latents_mean": [0.0], "latents_std": [1.0]}
    content = {"step": 1, "seed": 2, "model": {}, "objective": {"kind": "flow"}, "class_names": ["b"]}
    record = CheckpointRecord.from_dict({**content, "autoencoder": autoencoder, "of_a_later_version": 1})
    assert (record.recipe, record.source, record.latents_fingerprint, record.preprocessing) == (None,) * 4
    assert record.autoencoder == AutoencoderRecord.from_dict(autoencoder) and record.class_names == ("b",)


def test_a_checkpoint_of_something_else_has_no_record(small_model, save_model):
    checkpoint = save_model(small_model())
    without = dataclasses.replace(checkpoint, config={"stage": "autoencoder", "step": 3})
    with pytest.raises(
        ValueError, match="config.json has no 'model', expected a checkpoint of a diffusion transformer"
    ):
        _ = without.record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "config.json: found model 'x', expected a JSON object"),
        ({"autoencoder": None}, "config.json: found autoencoder 'None', expected a JSON object"),
        ({"objective": {}}, "found an objective of the kind 'None', expected diffusion or flow"),
        ({"objective": {"kind": "bridge"}}, "the kind 'bridge', .* Use the version of raydit that wrote it"),
        (
            {"source": {"format": "official", "name": "a.pt", "revision": 3}},
            "found the source .* the fields format, name",
        ),
        ({"source": "a.pt"}, "found the source a.pt"),
        ({"class_names": None}, "found class_names 'None', expected a list"),
    ],
)
def test_a_record_of_a_newer_version_or_of_something_else_is_refused(small_model, save_model, changes, message):
    checkpoint = save_model(small_model())
    changed = dataclasses.replace(checkpoint, config={**checkpoint.config, **changes})
    with pytest.raises(InvalidInput, match=message):
        _ = changed.record


def test_a_mean_and_a_step_that_are_none_are_refused(small_model, save_model):
    checkpoint = save_model(small_model())
    autoencoder = {**checkpoint.config["autoencoder"], "latents_mean": None}
    with pytest.raises(InvalidInput, match="found latents_mean 'None', expected a list"):
        _ = dataclasses.replace(checkpoint, config={**checkpoint.config, "autoencoder": autoencoder}).record
    for config in ({}, {"step": "3"}):
        with pytest.raises(InvalidInput, match="config.json: found step (None|3), expected a number"):
            _ = dataclasses.replace(checkpoint, config=config).step


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"kind": "flow", "path": "cosine"},
            "objective.path is 'cosine', expected a setting of a flow: time, time_shift",
        ),
        ({"kind": "flow", "time_shift": "sd3 "}, "objective.time_shift is 'sd3 ', expected a number"),
        ({"kind": "diffusion", "num_timesteps": "1000"}, "objective.num_timesteps is '1000', expected an integer"),
        ({"kind": ["flow"]}, "objective kind is .*, expected 'flow' or 'diffusion'"),
    ],
)
def test_an_objective_of_a_newer_version_is_refused(objective, message):
    with pytest.raises(InvalidInput, match=message):
        create_process(**objective)
