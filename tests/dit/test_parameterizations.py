"""Conversions between the parameterizations of a noised sample, and the weights of their errors."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import Prediction
from dit.diffusion import GaussianDiffusion
from dit.parameterizations import Parameterization, convert_prediction, from_x0_and_eps, loss_weight, x0_and_eps

PARAMETERIZATIONS = ("eps", "x0", "v", "score")
ANGLES = st.floats(0.05, math.pi / 2 - 0.05)  # at the ends one of the two is hidden below the precision


def numbers(angle):
    """Return a random prediction and x_t in float64, and alpha and sigma of a noise level."""
    prediction, x_t = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return prediction, x_t, math.cos(angle), math.sin(angle)


@settings(max_examples=30, deadline=None)
@given(ANGLES)
def test_every_parameterization_converts_to_every_other_and_back(angle):
    prediction, x_t, alpha, sigma = numbers(angle)
    for source, target in itertools.product(PARAMETERIZATIONS, PARAMETERIZATIONS):
        there = convert_prediction(prediction, x_t, alpha, sigma, source=source, target=target)
        back = convert_prediction(there, x_t, alpha, sigma, source=target, target=source)
        torch.testing.assert_close(back, prediction, atol=1e-9, rtol=1e-9)
        if source == target:
            torch.testing.assert_close(there, prediction, atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(ANGLES)
def test_conversion_through_a_third_parameterization_equals_direct_conversion(angle):
    prediction, x_t, alpha, sigma = numbers(angle)
    for source, between, target in itertools.permutations(PARAMETERIZATIONS, 3):
        halfway = convert_prediction(prediction, x_t, alpha, sigma, source=source, target=between)
        around = convert_prediction(halfway, x_t, alpha, sigma, source=between, target=target)
        direct = convert_prediction(prediction, x_t, alpha, sigma, source=source, target=target)
        torch.testing.assert_close(around, direct, atol=1e-8, rtol=1e-8)


@settings(max_examples=30, deadline=None)
@given(ANGLES)
def test_clean_latents_and_noise_of_every_parameterization_add_up_to_the_sample(angle):
    prediction, x_t, alpha, sigma = numbers(angle)
    for kind in PARAMETERIZATIONS:
        x0, eps = x0_and_eps(kind, prediction, x_t, alpha, sigma)
        torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, atol=1e-10, rtol=1e-10)


def test_v_is_the_velocity_of_the_rotation_from_latents_to_noise():
    x0, eps = torch.randn(2, 100, dtype=torch.float64)
    angle = torch.tensor(0.4, dtype=torch.float64)
    _, velocity = torch.autograd.functional.jvp(lambda a: a.cos() * x0 + a.sin() * eps, angle, torch.ones_like(angle))
    torch.testing.assert_close(from_x0_and_eps("v", x0, eps, math.cos(0.4), math.sin(0.4)), velocity)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_score_is_the_gradient_of_the_log_density(prediction):
    """The density is that of x_t given the clean latents, which the network predicts exactly."""
    process = GaussianDiffusion(prediction=prediction)
    latents, noise = torch.randn(2, 6, 4, 8, 8)
    t = torch.tensor([20, 100, 300, 500, 700, 900])
    x_t = process.add_noise(latents, noise, t).requires_grad_()
    abar = process.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    density = torch.distributions.Normal(abar.sqrt() * latents, (1 - abar).sqrt())
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    score = process.convert_prediction(process.target(latents, noise, t), x_t.detach(), t, target="score")
    torch.testing.assert_close(score, gradient, atol=1e-2, rtol=1e-3)


def test_the_best_noise_prediction_for_gaussian_data_is_the_score_of_its_noised_density():
    """Tweedie's formula; E[eps | x_t], the noise predictor of least squared error, is found by linear regression."""
    mean, std, angle = 0.7, 0.5, 0.9
    alpha, sigma = math.cos(angle), math.sin(angle)
    variance = (alpha * std) ** 2 + sigma**2
    x_t = torch.randn(100, dtype=torch.float64, requires_grad=True)
    eps = sigma * (x_t - alpha * mean) / variance
    density = torch.distributions.Normal(alpha * mean, math.sqrt(variance))
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(convert_prediction(eps, x_t, alpha, sigma, source="eps", target="score"), gradient)


def test_parameterizations_are_the_predictions_and_the_score():
    assert get_args(Parameterization) == (*get_args(Prediction), "score")


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_equal_those_of_the_paper(gamma):
    for snr in torch.logspace(-4, 4, 33, dtype=torch.float64):
        least = min(float(snr), gamma)
        for prediction, expected in (("x0", least), ("eps", least / snr), ("v", least / (snr + 1))):
            assert float(loss_weight("min_snr", prediction, snr, gamma)) == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(loss_weight("none", "v", torch.rand(5), gamma), torch.ones(5))


def test_min_snr_weights_the_error_in_the_clean_latents_equally_for_every_prediction():
    latents, noise, wrong = torch.randn(3, 6, 4, 8, 8)
    t = torch.tensor([20, 100, 300, 500, 700, 900])
    losses = []
    for prediction in get_args(Prediction):
        process = GaussianDiffusion(prediction=prediction, variance="fixed_small", weighting="min_snr")
        x_t = process.add_noise(latents, noise, t)
        alpha, sigma = (table[t].float().view(-1, 1, 1, 1) for table in tables(process))
        answer = convert_prediction(wrong, x_t, alpha, sigma, source="x0", target=prediction)
        losses.append(process.training_losses(lambda *_, answer=answer: answer, latents, t, None, noise)["loss"])
    snr = process.alphas_cumprod[t] / (1 - process.alphas_cumprod[t])
    expected = snr.clamp(max=5).float() * (wrong - latents).square().flatten(1).mean(1)
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def tables(process):
    return process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_weights_change_only_the_squared_error_and_are_off_by_default(prediction, variance):
    latents, noise = torch.randn(2, 6, 4, 8, 8)
    t = torch.tensor([0, 20, 300, 500, 700, 999])
    answer = torch.randn(6, 8 if variance == "learned_range" else 4, 8, 8)
    options = {"prediction": prediction, "variance": variance}
    plain, weighed = (
        GaussianDiffusion(**options, **more).training_losses(lambda *_: answer, latents, t, None, noise)
        for more in ({}, {"weighting": "min_snr", "min_snr_gamma": 2.0})
    )
    assert torch.equal(plain["mse"], weighed["mse"]) and torch.equal(plain["vb"], weighed["vb"])
    vb = plain["vb"] if variance == "learned_range" else 0
    torch.testing.assert_close(plain["loss"], plain["mse"] + vb)
    abar = GaussianDiffusion().alphas_cumprod[t]
    weight = loss_weight("min_snr", prediction, abar / (1 - abar), 2.0).float()
    torch.testing.assert_close(weighed["loss"], weight * plain["mse"] + vb)


def test_weights_of_a_spaced_process_follow_its_own_timesteps():
    full = GaussianDiffusion(weighting="min_snr")
    spaced = full.spaced(50)
    torch.testing.assert_close(spaced.loss_weight, full.loss_weight[spaced.timesteps], rtol=1e-12, atol=0)
