"""The stochastic sampler of flows: Gaussians in closed form, and a loop as SiT's paper describes it."""

import math
from typing import get_args

import pytest
import torch

from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.sampler_names import SdeDiffusion
from dit.samplers import sample_sde
from dit.sde import sde_times

FORMS = get_args(SdeDiffusion)
FLOW = FlowMatching()


def gaussian_velocity(mean, covariance):
    """The exact velocity for data from N(mean, covariance), of latents (N, D, 1, 1).

    With x = t x1 + (1 - t) x0 the velocity is E[x1 - x0 | x], a regression of jointly Gaussian variables.
    """
    identity = torch.eye(len(mean), dtype=torch.float64)

    def model(x, t, labels):
        t = float(t[0])
        gain = (t * covariance - (1 - t) * identity) @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * identity)
        flat = x.flatten(1).double()
        return (mean + (flat - t * mean) @ gain.T).float()[:, :, None, None]

    return model


@pytest.mark.parametrize(("form", "norm"), [("sigma", 1.0), ("constant", 0.25)])
def test_samples_of_a_gaussian_have_its_mean_and_covariance(form, norm):
    mean = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
    root = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.8]], dtype=torch.float64)
    covariance = root @ root.T
    x, model = torch.randn(10_000, 3, 1, 1), gaussian_velocity(mean, covariance)
    ours = sample_sde(model, x, None, process=FLOW, steps=100, diffusion=form, norm=norm)
    flat = ours.flatten(1).double()
    # Standard errors of the estimates, 0.01 or less, and the error of the method at 100 steps.
    torch.testing.assert_close(flat.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(torch.cov(flat.T), covariance, atol=0.05, rtol=0)


def exact_moments(steps, form, norm, shift, mean, variance):
    """Mean and variance of the samples for data from N(mean, variance): each step is affine in a Gaussian."""
    m, v = 0.0, 1.0
    times = sde_times(steps, shift, form)
    for i, (t, end) in enumerate(zip(times, times[1:], strict=False)):
        dt, strength = end - t, independent_diffusion(form, t, norm)
        # The velocity is a x + b, and the score of N(t mean, t^2 variance + (1 - t)^2) follows without the velocity.
        at_t = t**2 * variance + (1 - t) ** 2
        a = (t * variance - (1 - t)) / at_t - strength / at_t
        b = mean - (t * variance - (1 - t)) / at_t * t * mean + strength * t * mean / at_t
        m, v = m + dt * (a * m + b), (1 + dt * a) ** 2 * v
        v += 2 * strength * dt if i < steps - 1 else 0.0
    return m, v


def independent_diffusion(form, t, norm):
    sigma = 1 - t
    return {
        "constant": norm,
        "sbdm": norm * (sigma**2 / t + sigma) if t else math.inf,  # alpha'/alpha sigma^2 - sigma sigma'
        "sigma": norm * sigma,
        "decreasing": ((norm * math.cos(math.pi * t) + 1) / 2) ** 2,
        "increasing_decreasing": norm * (1 - math.cos(2 * math.pi * t)) / 2,
    }[form]


@pytest.mark.parametrize("shift", [None, 2.5])
@pytest.mark.parametrize("form", FORMS)
def test_every_step_is_that_of_the_equation(form, shift):
    """Without randomness: the mean from noise 0, and the variance from unit noise of one step at a time."""
    mean, variance, steps, norm = 0.7, 0.25, 8, 0.6
    model = gaussian_velocity(*(torch.tensor(value, dtype=torch.float64) for value in ([mean], [[variance]])))
    options = {"process": FLOW, "steps": steps, "diffusion": form, "norm": norm, "time_shift": shift}

    def sample(start, noise_of_step=None):
        x = torch.full((1, 1, 1, 1), start)
        return float(sample_sde(model, x, None, step_noise=lambda i, x: 0 * x + (i == noise_of_step), **options))

    expected_mean, expected_variance = exact_moments(steps, form, norm, shift, mean, variance)
    at_mean = sample(0.0)
    effects = [sample(1.0) - at_mean] + [sample(0.0, i) - at_mean for i in range(steps - 1)]
    assert at_mean == pytest.approx(expected_mean, rel=1e-4)
    assert sum(effect**2 for effect in effects) == pytest.approx(expected_variance, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_samples_equal_those_of_a_loop_as_the_paper_describes_it(form):
    def model(x, t, y):
        return torch.tanh(x) + torch.sin(3 * t + y).view(-1, 1, 1, 1)

    steps, norm = 6, 0.8
    x, y, draws = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(steps, 2, 4, 8, 8)
    ours = sample_sde(
        model, x, y, process=FLOW, steps=steps, step_noise=lambda i, x: draws[i], diffusion=form, norm=norm
    )
    times = torch.linspace(0.001 if form == "sbdm" else 0.0, 0.96, steps, dtype=torch.float64)
    dt = float(times[1] - times[0])
    for i, t in enumerate([*times[:-1].tolist(), 0.96]):
        v = model(x, torch.full((2,), t), y)
        noise_estimate = x - t * v  # x = t x1 + (1 - t) x0 and v = x1 - x0
        w = 2 * independent_diffusion(form, t, norm)
        drift = v - 0.5 * w * noise_estimate / (1 - t)  # the score is -x0 / sigma
        x = x + drift * (0.04 if i == steps - 1 else dt)
        if i < steps - 1:
            x = x + math.sqrt(w * dt) * draws[i]
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_times_are_equal_steps_to_0_96_and_one_to_the_data():
    assert sde_times(5, None, "sigma") == pytest.approx([0, 0.24, 0.48, 0.72, 0.96, 1])
    assert sde_times(5, None, "sbdm")[0] == 0.001
    sigma = 1 - torch.tensor(sde_times(5, None, "sigma"))
    assert sde_times(5, 3.0, "sigma") == pytest.approx((1 - 3 * sigma / (1 + 2 * sigma)).tolist(), abs=1e-6)


def test_the_last_step_adds_no_noise():
    drawn = []

    def step_noise(i, x):
        drawn.append(i)
        return x

    sample_sde(lambda x, t, y: x, torch.zeros(1, 1, 2, 2), None, process=FLOW, steps=4, step_noise=step_noise)
    assert drawn == [0, 1, 2]


def test_one_step_and_another_process_are_refused(small_model):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="1 sampling steps requested, expected at least 2"):
        sample_sde(small_model(), x, None, process=FLOW, steps=1)
    with pytest.raises(ValueError, match="'sde' is for flow models, and this model was trained with diffusion"):
        sample_sde(small_model(), x, None, process=GaussianDiffusion(), steps=4)
