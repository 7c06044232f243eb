"""Precision, recall, density and coverage without each block of samples, against the scores of the other blocks."""

import numpy as np
import pytest

from evaluation import neighbours
from evaluation.manifold_errors import manifold_estimates
from evaluation.metrics import manifold_scores
from evaluation.statistics import assign_random_parts
from raydit.errors import InvalidInput


@pytest.mark.parametrize("block_values", [2**24, 700])
@pytest.mark.parametrize("kind", ["random", "sorted", "copies"])
def test_estimates_are_the_scores_of_the_other_blocks(monkeypatch, block_values, kind):
    """Sorted samples have nearly all nearest neighbours in their own block; copies are at distance 0."""
    rng = np.random.default_rng(3)
    generated, real = rng.normal(size=(90, 4)).astype(np.float32), rng.normal(0.3, 1, size=(70, 4)).astype(np.float32)
    block_of = assign_random_parts(90, 6)
    if kind == "sorted":
        block_of = np.sort(block_of)
        generated += 4 * block_of[:, None]
        real[:35] += 8
    elif kind == "copies":
        generated[40:60] = generated[:20]
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", block_values)
    found = manifold_estimates(generated, real, block_of)
    assert found.scores == manifold_scores(generated, real)
    for block in range(6):
        expected = manifold_scores(generated[block_of != block], real)
        assert {name: values[block] for name, values in found.left_out.items()} == expected._asdict()


def test_few_samples_are_refused():
    with pytest.raises(InvalidInput, match="5 generated and 9 real samples, expected more than k = 5"):
        manifold_estimates(np.zeros((5, 2)), np.zeros((9, 2)), np.arange(5) % 2)
