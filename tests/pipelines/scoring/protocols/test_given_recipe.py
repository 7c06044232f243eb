"""A recipe given for an evaluation: which of its settings the checkpoint's own take the place of."""

from dataclasses import replace

import pytest
from tiny import RECIPE, places
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.reader import RecipeError
from pipelines.scoring.protocols.given_recipe import load_given_recipe


@pytest.mark.parametrize("recorded", [None, "counter"])
def test_noise_is_drawn_as_the_checkpoint_says_unless_a_flag_says_otherwise(tmp_path, capsys, recorded):
    """So that an older checkpoint keeps its protocols by a shipped recipe, which draws by the counter by now."""
    config = replace(tiny_output(tmp_path), random=recorded)
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    assert load_given_recipe(str(RECIPE), places(tmp_path))(opened).random == recorded
    assert ("random: " in capsys.readouterr().out) == (recorded is None)
    assert load_given_recipe(str(RECIPE), (*places(tmp_path), "random=counter"))(opened).random == "counter"


def test_weights_may_be_any_average_that_the_checkpoint_or_the_recipe_names(tmp_path):
    opened = open_checkpoint(write_checkpoint(tiny_output(tmp_path, "train.ema_sigma_rels=[0.05]"), 2).path)
    given = load_given_recipe(str(RECIPE), (*places(tmp_path), "evaluate.weights=ema_0.05"))
    assert given(opened).evaluate.weights == "ema_0.05"
    both = load_given_recipe(str(RECIPE), (*places(tmp_path), "train.ema_sigma_rels=[0.1, 0.05]"))
    assert both(opened).train.ema_sigma_rels == (0.1, 0.05)
    with pytest.raises(RecipeError, match="evaluate.weights: found 'ema_0.2', expected one of ema, raw, ema_0.05"):
        load_given_recipe(str(RECIPE), (*places(tmp_path), "evaluate.weights=ema_0.2"))(opened)
