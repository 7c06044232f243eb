"""Weights that have changed since they were written are refused before features are computed, and on cards."""

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeContext
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.tune import TuneGrid
from pipelines.evaluate import evaluate
from pipelines.scoring.cards import open_scored
from pipelines.scoring.seeds import plan_seeds
from pipelines.tune import tune
from raydit.errors import InvalidInput


@pytest.fixture
def damaged(tmp_path):
    """A recipe, and its checkpoint whose averaged weights differ in one bit."""
    config = tiny_output(tmp_path)
    checkpoint = write_checkpoint(config, 2)
    file = Path(checkpoint.path) / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return config, open_checkpoint(checkpoint.path)


def test_they_are_refused_before_features_are_computed(damaged):
    config, opened = damaged
    with pytest.raises(InvalidInput, match="ema.safetensors: the file changed after it was written"):
        plan_seeds(opened, config, repeats=1, force=False, saved=None)
    with pytest.raises(InvalidInput, match="ema.safetensors: the file changed after it was written"):
        evaluate(opened, config=config, context=FakeContext())


def test_those_of_a_guide_are_refused_as_well(damaged):
    config, opened = damaged
    whole = open_checkpoint(write_checkpoint(config, 4).path)
    guided = replace(config, evaluate=replace(config.evaluate, autoguidance=opened.origin, cfg_scale=2.0))
    with pytest.raises(InvalidInput, match="step_0000002/ema.safetensors: the file changed after it was written"):
        plan_seeds(whole, guided, repeats=1, force=False, saved=None)


def test_a_search_for_settings_does_not_begin_with_them(damaged):
    config, opened = damaged
    config = replace(config, evaluate=replace(config.evaluate, num_samples=20))
    with pytest.raises(InvalidInput, match="ema.safetensors: the file changed after it was written"):
        tune([opened], lambda _: config, TuneGrid(cfg_scale=(1.0, 2.0)), context=FakeContext())


def test_they_are_neither_published_nor_verified_although_their_digest_is_recorded(damaged):
    _, opened = damaged
    with pytest.raises(InvalidInput, match="ema.safetensors: the file changed after it was written"):
        open_scored(opened.origin, opened.digest, "ema")
    assert open_scored(opened.origin, opened.digest, "raw").digest == opened.digest
