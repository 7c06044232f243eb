"""DPM-Solver++ for flows, against diffusers' scheduler and a Gaussian in closed form."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from dit.flow import FlowMatching
from dit.samplers import sample_dpmpp_2m, sample_euler

FLOW = FlowMatching()


def model(x, t, labels):
    """A velocity that depends on x and t, but not linearly."""
    return torch.tanh(x) + torch.sin(3 * t).view(-1, 1, 1, 1)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("shift", [None, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_samples_equal_those_of_diffusers_scheduler(steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift or 1.0
    )
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8)
    expected = x
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        # Its timesteps are rounded down to integers; the noise level is exact. Velocity runs the other way.
        output = -model(expected, torch.full((2,), 1 - float(sigma)), None)
        expected = scheduler.step(output, timestep, expected).prev_sample
    ours = sample_dpmpp_2m(model, x, None, process=FLOW, steps=steps, time_shift=shift)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_it_converges_to_a_gaussian_faster_than_euler():
    """Data from N(0.7, 0.25): the flow takes noise x to 0.7 + 0.5 x, from t = 0 on."""

    def velocity(x, t, labels):
        t = t.view(-1, 1, 1, 1)
        return 0.7 + (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * (x - 0.7 * t)

    start = 1e-3
    deviation = math.sqrt(0.25 * start**2 + (1 - start) ** 2)
    x = torch.randn(1, 4, 8, 8)
    exact = 0.7 + 0.5 * (x - start * 0.7) / deviation
    errors = [
        float((sample_dpmpp_2m(velocity, x, None, process=FLOW, steps=steps) - exact).abs().max()) for steps in (20, 80)
    ]
    # Not quite of second order, because the first step covers most of the range of noise-to-signal ratios.
    assert errors[1] < 4e-3 and math.log2(errors[0] / errors[1]) / 2 > 1.3
    euler = sample_euler(velocity, x, None, process=FLOW, steps=80)
    assert errors[1] < 0.2 * float((euler - (0.7 + 0.5 * x)).abs().max())
