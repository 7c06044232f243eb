"""Counter-based draws for a whole batch against a generator seeded for each image, alternately.

Needs only torch and NumPy. Asserts only that both sides draw standard normal numbers of the same shape.
"""

import math

import numpy as np
import pytest
import torch
from harness import alternate

from dit.random import Stream, normal

pytestmark = pytest.mark.benchmark

CASES = {
    "32 images, latents 4 x 8 x 8": (32, (4, 8, 8)),
    "256 images, latents 4 x 32 x 32": (256, (4, 32, 32)),
}


def from_generators(seed: int, step: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw as training does without random = "counter": one generator per image, seeded by NumPy."""
    generator, drawn = torch.Generator(), []
    for position in range(count):
        state = np.random.SeedSequence((seed, int(Stream.NOISE), step, position)).generate_state(1, np.uint64)
        drawn.append(torch.randn(shape, generator=generator.manual_seed(int(state[0]))))
    return torch.stack(drawn)


@pytest.mark.parametrize("case", CASES)
def test_normal_draws(results, quick, case):
    count, shape = CASES[case]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    positions = torch.arange(count)

    def ours() -> torch.Tensor:
        return normal(0, Stream.NOISE, 1, positions, shape, device)

    def theirs() -> torch.Tensor:
        return from_generators(0, 1, count, shape).to(device)

    for drawn in (ours(), theirs()):
        assert drawn.shape == (count, *shape) and abs(float(drawn.std()) - 1) < 5 / math.sqrt(drawn.numel())
    timings = alternate({"ours": ours, "theirs": theirs}, rounds=5 if quick else 50)
    measured = f"{1e3 * timings['ours'].median:.2f} ms"
    results.add_speedup(
        "normal draws", case, measured, "a generator for each image", timings["ours"], timings["theirs"]
    )
