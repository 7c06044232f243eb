"""Time shift against diffusers' scheduler of flows, and in training."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit.flow import FlowMatching
from dit.samplers import SAMPLERS, sample_euler, sample_heun
from dit.time_shift import shift_factor, shift_time, time_grid


def model(x, t, labels):
    """A velocity that depends on x and t, but not linearly."""
    return torch.tanh(x) + torch.sin(3 * t).view(-1, 1, 1, 1)


def diffusers_times(steps, **settings):
    mu = settings.pop("mu", None)
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    return scheduler


@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0, 6.93])
def test_euler_equals_diffusers_scheduler(shift):
    x, steps = torch.randn(2, 4, 8, 8), 12
    scheduler = diffusers_times(steps, shift=shift)
    expected = x
    for timestep in scheduler.timesteps:
        # Time runs the other way in diffusers: from noise at 1000 to data at 0.
        output = -model(expected, torch.full((2,), 1 - float(timestep) / 1000), None)
        expected = scheduler.step(output, timestep, expected).prev_sample
    ours = sample_euler(model, x, None, process=FlowMatching(), steps=steps, time_shift=shift)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_the_rule_of_flux_equals_diffusers_dynamic_shifting(tokens):
    slope = (1.15 - 0.5) / (4096 - 256)
    scheduler = diffusers_times(10, use_dynamic_shifting=True, mu=tokens * slope + 0.5 - slope * 256)
    factor = shift_factor("flux", num_tokens=tokens)
    starts = [start for start, _, _ in time_grid(10, factor)]
    torch.testing.assert_close(1 - torch.tensor(starts), scheduler.sigmas[:-1], atol=1e-6, rtol=0)
    assert tokens != 256 or factor == pytest.approx(math.exp(0.5))


def test_rules_give_numbers():
    assert shift_factor("sd3") == 3.0
    assert shift_factor("dimension", (4, 32, 32)) == 1.0
    assert shift_factor("dimension", (768, 16, 16)) == pytest.approx(math.sqrt(48))
    assert shift_factor(2) == 2.0


@pytest.mark.parametrize("rule", [0.0, -1.0, math.inf, math.nan, "sd4"])
def test_other_shifts_are_refused(rule):
    with pytest.raises(ValueError, match="time_shift is .* expected a number above 0, or one of sd3, dimension, flux"):
        shift_factor(rule)


def test_a_shift_moves_noise_levels_as_published_and_leaves_the_ends():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = 1 - t
    torch.testing.assert_close(1 - shift_time(t, 3.0), 3 * sigma / (1 + 2 * sigma))
    assert shift_time(0.0, 7.0) == 0.0 and shift_time(1.0, 7.0) == 1.0
    torch.testing.assert_close(shift_time(shift_time(t, 4.0), 0.25), t)


@pytest.mark.parametrize("shift", [None, 1.0, 2.0])
def test_steps_of_a_grid_join(shift):
    steps = list(time_grid(7, shift))
    assert steps[0][0] == 0.0 and steps[-1][1] == 1.0
    assert [end for _, end, _ in steps[:-1]] == [start for start, _, _ in steps[1:]]
    assert [end - start for start, end, _ in steps] == pytest.approx([1 / inverse for _, _, inverse in steps])


@pytest.mark.parametrize("name", ["euler", "heun", "sde", "dpmpp_2m"])
def test_a_shift_of_1_changes_nothing(name):
    x, draws = torch.randn(2, 4, 8, 8), torch.randn(9, 2, 4, 8, 8)
    plain, shifted = (
        SAMPLERS[name](
            model, x, None, process=FlowMatching(), steps=9, time_shift=shift, step_noise=lambda i, x: draws[i]
        )
        for shift in (None, 1.0)
    )
    torch.testing.assert_close(shifted, plain)


def test_heun_of_a_shifted_path_is_of_second_order():
    """dx/dt = x has the solution e x."""
    x, options = torch.ones(1, 1, 1, 1), {"process": FlowMatching(), "time_shift": 3.0}
    samples = (float(sample_heun(lambda x, t, y: x, x, None, steps=steps, **options)) for steps in (20, 40))
    errors = [abs(sample - math.e) for sample in samples]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_training_times_are_those_of_the_density_shifted(time):
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    sigma = 1 - FlowMatching(time).sample_timesteps(u).double()
    shifted = FlowMatching(time, time_shift=3.0).sample_timesteps(u)
    assert shifted.dtype == torch.float32
    torch.testing.assert_close(1 - shifted.double(), 3 * sigma / (1 + 2 * sigma), atol=1e-6, rtol=0)


def test_shifted_uniform_times_have_their_distribution():
    """sigma' <= s has probability sigma(s), the inverse shift of s."""
    u = (torch.arange(10_000) + 0.5) / 10_000
    sigma = 1 - FlowMatching(time_shift=4.0).sample_timesteps(u)
    for s in (0.2, 0.5, 0.9):
        assert float((sigma <= s).float().mean()) == pytest.approx(s / (4 - 3 * s), abs=1e-3)
