"""The extractors that a recipe offers."""

from typing import get_args, get_type_hints

from evaluation.extractors import EXTRACTORS
from pipelines.config.evaluate import EvaluateConfig


def test_a_recipe_offers_every_extractor():
    assert get_args(get_type_hints(EvaluateConfig)["extractor"]) == tuple(EXTRACTORS)
