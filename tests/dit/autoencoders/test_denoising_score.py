"""How well a tiny DiT denoises latents: the baseline in closed form, and latents with and without structure."""

import math

import pytest
import torch

from dit.autoencoders import denoising_score as module
from dit.autoencoders.denoising_score import central_window, denoising_score, elementwise_velocity
from raydit.errors import InvalidInput


@pytest.fixture
def short(monkeypatch):
    """A budget that a test can afford."""
    monkeypatch.setattr(module, "STEPS", 50)
    monkeypatch.setattr(module, "BATCH_SIZE", 16)
    monkeypatch.setattr(module, "WARM_UP_STEPS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads spend their time waiting where other processes work
    yield
    torch.set_num_threads(threads)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("time", [0.0, 0.3, 0.9])
def test_the_baseline_has_the_error_of_the_closed_form(variance, time):
    noise, data = normal(2, 20_000, 1, 1, 2).unbind(0)
    data = 3 + data * variance**0.5
    t = torch.full((len(data),), time)
    x_t = time * data + (1 - time) * noise
    error = elementwise_velocity(x_t, t, torch.tensor(3.0), torch.tensor(variance)) - (data - noise)
    expected = variance / (time**2 * variance + (1 - time) ** 2)
    assert float(error.square().mean()) == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_nothing_can_be_learned_of_white_noise_and_much_of_latents_that_are_alike(short):
    white = denoising_score(normal(100, 1, 3, 3), torch.zeros(100, 1, 3, 3), seed=0)
    assert white.baseline == pytest.approx(math.pi / 2, rel=0.1)
    assert white.ratio > 0.97
    plain = normal(100, 1, 1, 1).expand(100, 1, 3, 3)
    alike = denoising_score(plain, torch.zeros_like(plain), seed=0)
    assert alike.ratio < 0.85


def test_the_variance_of_the_posterior_counts(short, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    drawn = denoising_score(torch.zeros(100, 1, 3, 3), torch.ones(100, 1, 3, 3), seed=0)
    assert drawn.baseline == pytest.approx(math.pi / 2, rel=0.1)


def test_the_score_is_a_function_of_latents_and_seed(short, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 12)
    latents, std = normal(30, 2, 2, 2), 0.1 * torch.ones(30, 2, 2, 2)
    first = denoising_score(latents, std, seed=0)
    torch.manual_seed(99)
    assert denoising_score(latents, std, seed=0) == first
    assert denoising_score(latents, std, seed=1) != first
    with pytest.raises(InvalidInput, match="at least 10"):
        denoising_score(latents[:9], std[:9], seed=0)


@pytest.mark.parametrize(("side", "expected"), [(7, 7), (8, 8), (13, 12), (16, 16), (40, 16)])
def test_a_window_is_central_and_has_patches(side, expected):
    rows = torch.arange(side).float().view(side, 1).expand(1, 1, side, side)
    window = central_window(rows)
    assert window.shape == (1, 1, expected, expected)
    assert window[0, 0, 0, 0] == (side - expected) // 2
