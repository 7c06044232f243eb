import math

import pytest
import torch

from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.sampler_names import SAMPLER_PROCESSES
from dit.samplers import (
    SAMPLERS,
    guided,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)

MEAN, STD = 0.7, 0.5
PAIRS = [(name, kind) for name, kinds in SAMPLER_PROCESSES.items() for kind in kinds]
PROCESSES = {"flow": FlowMatching(), "diffusion": GaussianDiffusion()}


def optimal_eps(mean=MEAN, std=STD):
    """Return the optimal noise predictor for data from N(mean, std²)."""
    alphas_cumprod = GaussianDiffusion().alphas_cumprod

    def model(x, t, labels):
        abar = alphas_cumprod[t].view(-1, 1, 1, 1)
        variance = abar * std**2 + 1 - abar
        return ((1 - abar).sqrt() * (x - abar.sqrt() * mean) / variance).float()

    return model


def optimal_velocity(mean=MEAN, std=STD):
    """Return the optimal velocity predictor for data from N(mean, std²)."""

    def model(x, t, labels):
        t = t.view(-1, 1, 1, 1)
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return model


def relative_error(ours, expected):
    return float((ours - expected).abs().max() / expected.abs().max())


def test_ancestral_sampling_equals_the_reference(dit_a, golden):
    expected = golden("sampling8.safetensors")
    ours = sample_ddpm(
        dit_a,
        expected["z"],
        expected["y"],
        process=GaussianDiffusion(),
        steps=8,
        step_noise=lambda i, x: expected["noise_stream_seed1234"][i],
    )
    assert relative_error(ours, expected["p_sample8.noclip"]) < 1e-5


def test_guided_ancestral_sampling_equals_the_reference(dit_a, golden):
    expected = golden("sampling8.safetensors")
    ours = sample_ddpm(
        guided(dit_a, 1.5, channels=3),
        expected["z"],
        expected["y"],
        process=GaussianDiffusion(),
        steps=8,
        step_noise=lambda i, x: expected["noise_stream_cfg_seed1234"][i][:4],
    )
    assert relative_error(ours, expected["cfg1.5.p_sample8.noclip"][:4]) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_the_reference(eta, dit_a, golden):
    expected = golden("sampling8.safetensors")
    ours = sample_ddim(
        dit_a,
        expected["z"],
        expected["y"],
        process=GaussianDiffusion(),
        steps=8,
        step_noise=lambda i, x: expected["noise_stream_seed1234"][i],
        eta=eta,
    )
    assert relative_error(ours, expected[f"ddim8.eta{eta}.noclip"]) < 1e-5


def test_euler_equals_the_reference(dit_a, golden):
    expected = golden("sit_linear.safetensors")
    ours = sample_euler(dit_a, expected["z"], expected["z_y"], process=FlowMatching(), steps=10)
    assert relative_error(ours, expected["ode.euler.num_steps11"]) < 1e-5


def diffusers_samples(model, x, labels, variance):
    """Return samples as diffusers' schedulers with 20 steps draw them."""
    process = GaussianDiffusion(variance=variance)
    strided = process.spaced(20, constant_stride=True)
    return {
        "ddim": sample_ddim(model, x, labels, process=strided, steps=20),
        "dpmpp2m": sample_dpmpp_2m(model, x, labels, process=process, steps=20, karras=False),
        "dpmpp2m_karras": sample_dpmpp_2m(model, x, labels, process=process, steps=20),
    }


def test_samples_equal_those_of_diffusers_schedulers(dit_a, golden):
    expected = golden("schedulers.safetensors")
    samples = diffusers_samples(dit_a, expected["x_init"], expected["y"], "learned_range")
    for name, sample in samples.items():
        assert relative_error(sample, expected[f"{name}.20.final.dit_a"]) < 1e-5


def test_samples_of_a_gaussian_equal_those_of_diffusers_schedulers(golden):
    """The Gaussian's standard deviation is 0.5; its mean, one number per latent, is not stored.

    Samples are affine in noise and mean, so the mean follows from one scheduler and must explain the others.
    """
    expected = golden("schedulers.safetensors")
    x, one = expected["x_init"], torch.ones(1, 4, 8, 8)
    from_noise = diffusers_samples(optimal_eps(0.0, 0.5), x, None, "fixed_small")
    from_mean = diffusers_samples(optimal_eps(1.0, 0.5), 0 * one, None, "fixed_small")
    mean = (expected["ddim.20.final.analytic"] - from_noise["ddim"]) / from_mean["ddim"]
    torch.testing.assert_close(mean[0], mean[1], atol=1e-5, rtol=0)
    for name in ("dpmpp2m", "dpmpp2m_karras"):
        ours = from_noise[name] + mean * from_mean[name]
        assert relative_error(ours, expected[f"{name}.20.final.analytic"]) < 2e-5


def test_ddim_with_eta_one_is_ancestral_sampling_with_the_posteriors_variance():
    process = GaussianDiffusion(variance="fixed_small")
    x, draws = torch.randn(2, 4, 8, 8), torch.randn(20, 2, 4, 8, 8)
    options = {"process": process, "steps": 20, "step_noise": lambda i, x: draws[i]}
    ancestral = sample_ddpm(optimal_eps(), x, None, **options)
    torch.testing.assert_close(sample_ddim(optimal_eps(), x, None, eta=1.0, **options), ancestral, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m"])
def test_samples_do_not_depend_on_what_the_network_predicts(name, prediction):
    eps_model, x = optimal_eps(), torch.randn(2, 4, 8, 8)
    by_eps = GaussianDiffusion(variance="fixed_large")
    process = GaussianDiffusion(variance="fixed_large", prediction=prediction)

    def model(x, t, labels):
        x0, eps = by_eps.to_x0_and_eps(eps_model(x, t, labels), x, t)
        return process.target(x0, eps, t)

    draws = torch.randn(10, 2, 4, 8, 8)
    options = {"steps": 10, "step_noise": lambda i, x: draws[i]}
    expected = SAMPLERS[name](eps_model, x, None, process=by_eps, **options)
    ours = SAMPLERS[name](model, x, None, process=process, **options)
    # Karras' noise levels lie between timesteps, where the conversion at the timestep is not exact.
    tolerance = 2e-2 if name == "dpmpp_2m" else 1e-3
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def exact_diffusion_solution(x):
    """End point of the probability flow from x for data from N(MEAN, STD²)."""
    abar = float(GaussianDiffusion().alphas_cumprod[-1])
    return MEAN + STD * (x - math.sqrt(abar) * MEAN) / math.sqrt(abar * STD**2 + 1 - abar)


@pytest.mark.parametrize(
    ("name", "steps", "options", "tolerance"),
    [
        ("ddim", 1000, {}, 1e-2),
        ("dpmpp_2m", 100, {"karras": True}, 5e-3),
        ("dpmpp_2m", 100, {"karras": False}, 5e-3),
    ],
)
def test_deterministic_samplers_solve_the_probability_flow_of_a_gaussian(name, steps, options, tolerance):
    x = torch.randn(1, 4, 8, 8)
    process = GaussianDiffusion(variance="fixed_small")
    ours = SAMPLERS[name](optimal_eps(), x, None, process=process, steps=steps, **options)
    assert (ours - exact_diffusion_solution(x)).abs().max() < tolerance


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_diffusion_samplers_converge_to_the_gaussian_at_their_order(name, order):
    x = torch.randn(1, 4, 8, 8)
    process = GaussianDiffusion(variance="fixed_small")
    coarse, fine = (
        SAMPLERS[name](optimal_eps(), x, None, process=process, steps=steps) - exact_diffusion_solution(x)
        for steps in (20, 80)
    )
    assert math.log2(coarse.abs().max() / fine.abs().max()) / 2 == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_samples_of_a_gaussian_have_its_moments(variance):
    torch.manual_seed(0)
    x = torch.randn(16, 4, 16, 16)
    ours = sample_ddpm(optimal_eps(), x, None, process=GaussianDiffusion(variance=variance), steps=1000)
    assert float(ours.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(ours.std()) == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_flow_samplers_converge_to_the_gaussian_at_their_order(name, order):
    x = torch.randn(1, 4, 8, 8)
    exact = MEAN + STD * x
    coarse, fine = (
        SAMPLERS[name](optimal_velocity(), x, None, process=FlowMatching(), steps=steps) - exact for steps in (40, 80)
    )
    assert coarse.abs().max() < 0.1
    assert math.log2(coarse.abs().max() / fine.abs().max()) == pytest.approx(order, abs=0.3)


def test_one_euler_step_follows_the_velocity_at_noise():
    x = torch.randn(2, 4, 8, 8)
    ours = sample_euler(optimal_velocity(), x, None, process=FlowMatching(), steps=1)
    torch.testing.assert_close(ours, x + optimal_velocity()(x, torch.zeros(2), None))


def test_heun_evaluates_at_both_ends_of_each_step():
    times = []

    def model(x, t, labels):
        times.append(float(t[0]))
        return x

    sample_heun(model, torch.randn(1, 4, 8, 8), None, process=FlowMatching(), steps=2)
    assert times == [0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_sample_is_the_same_alone_and_in_a_batch(name, kind, small_model):
    model = guided(small_model(learn_sigma=kind == "diffusion"), 1.5)
    x, labels, draws = torch.randn(4, 4, 8, 8), torch.arange(4), torch.randn(6, 4, 4, 8, 8)

    def sample(rows):
        return SAMPLERS[name](
            model,
            x[rows],
            labels[rows],
            process=PROCESSES[kind],
            steps=6,
            step_noise=lambda i, x: draws[i][rows],
        )

    batch = sample(slice(0, 4))
    assert all(relative_error(sample(slice(i, i + 1)), batch[i : i + 1]) < 1e-4 for i in range(4))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_callback_sees_every_step_and_no_graph_is_built(name, kind, small_model):
    model = small_model(learn_sigma=kind == "diffusion")
    seen = []
    out = SAMPLERS[name](
        model,
        torch.randn(2, 4, 8, 8),
        torch.tensor([1, 2]),
        process=PROCESSES[kind],
        steps=3,
        callback=lambda i, x: seen.append((i, x)),
    )
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], out) and not out.requires_grad and bool(out.isfinite().all())


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] != "sde"])
def test_one_step_gives_finite_samples(name, kind, small_model):
    model = small_model(learn_sigma=kind == "diffusion")
    x = torch.randn(2, 4, 8, 8)
    out = SAMPLERS[name](model, x, torch.tensor([1, 2]), process=PROCESSES[kind], steps=1)
    assert out.shape == x.shape and bool(out.isfinite().all())


def test_default_step_noise_is_torchs_generator(small_model):
    def sample():
        torch.manual_seed(3)
        return sample_ddpm(
            small_model(),
            torch.zeros(1, 4, 8, 8),
            torch.tensor([1]),
            process=GaussianDiffusion(),
            steps=4,
        )

    assert torch.equal(sample(), sample())


@pytest.mark.parametrize(
    ("call", "found", "expected", "advice"),
    [
        (
            lambda m, x: sample_euler(m, x, None, process=GaussianDiffusion(), steps=5),
            "trained with diffusion",
            "'euler' is for flow",
            "Use ddpm or ddim or dpmpp_2m",
        ),
        (
            lambda m, x: sample_ddim(m, x, None, process=FlowMatching(), steps=5),
            "trained with flow",
            "'ddim' is for diffusion",
            "Use euler or heun",
        ),
        (
            lambda m, x: sample_heun(m, x, None, process=FlowMatching(), steps=0),
            "0 sampling steps",
            "at least 1",
            "Use more steps",
        ),
        (
            lambda m, x: sample_dpmpp_2m(m, x, None, process=GaussianDiffusion(), steps=1000),
            "1000 sampling steps",
            "expected 1 to 999",
            "Use fewer",
        ),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(call, found, expected, advice, small_model):
    with pytest.raises(ValueError) as error:
        call(small_model(), torch.zeros(2, 4, 8, 8))
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)
