"""The noise of samples, by generators and by a counter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dit.random import Stream, normal
from evaluation.protocol import EvaluationProtocol, sample_seed
from pipelines.scoring.samples.noise import sample_noise

PROTOCOL = EvaluationProtocol(seed=7, decoder="d", extractor="e", extractor_sha256="s", reference_digest="r")
SHAPE = (4, 3, 5)


def draw(random, indices, steps=3):
    """The start's noise and that of the first steps, (steps + 1, N, C, H, W)."""
    noise = sample_noise(replace(PROTOCOL, random=random), np.array(indices), SHAPE, "cpu")
    start = noise.start()
    return torch.stack([start, *(noise.step(number, start) for number in range(steps))])


@pytest.mark.parametrize("random", [None, "counter"])
def test_the_noise_of_a_sample_is_a_function_of_its_index(random):
    whole = draw(random, range(12))
    assert len(torch.unique(whole.flatten(0, 1).flatten(1), dim=0)) == whole.shape[0] * whole.shape[1]
    assert torch.equal(draw(random, [7, 3]), whole[:, [7, 3]])
    assert abs(float(whole.mean())) < 4 / whole.numel() ** 0.5


def test_a_counter_draws_the_start_at_step_0_and_every_step_at_its_number():
    indices = [0, 50_000, 2**32 - 1]
    positions = torch.tensor(indices)
    start, *steps = draw("counter", indices)
    assert torch.equal(start, normal(7, Stream.START_NOISE, 0, positions, SHAPE))
    for number, step in enumerate(steps):
        assert torch.equal(step, normal(7, Stream.STEP_NOISE, number, positions, SHAPE))


def test_generators_draw_what_they_drew_before_there_was_a_counter():
    generator = torch.Generator().manual_seed(sample_seed(7, 3, 1))
    expected = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(3)])
    assert torch.equal(draw(None, [3])[1:, 0], expected)
