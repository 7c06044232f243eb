import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.diffusion import GaussianDiffusion, discretized_log_likelihood, gaussian_kl

TABLES = {  # the reference's names -> ours
    "alphas_cumprod": "alphas_cumprod",
    "alphas_cumprod_prev": "alphas_cumprod_prev",
    "betas": "betas",
    "posterior_log_variance_clipped": "log_variance_small",
    "posterior_mean_coef1": "posterior_mean_x0",
    "posterior_mean_coef2": "posterior_mean_xt",
    "posterior_variance": "posterior_variance",
    "sqrt_alphas_cumprod": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_cumprod",
}


def batch(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    return latents, noise, torch.randint(1, 1000, (count,), generator=generator)


@pytest.mark.parametrize("name", ["linear1000", "spaced[250]", "spaced[50]", "spaced[ddim50]"])
def test_tables_equal_the_references(name, golden):
    process = {
        "linear1000": lambda: GaussianDiffusion(),
        "spaced[250]": lambda: GaussianDiffusion().spaced(250),
        "spaced[50]": lambda: GaussianDiffusion().spaced(50),
        "spaced[ddim50]": lambda: GaussianDiffusion().spaced(50, constant_stride=True),
    }[name]()
    expected = golden("diffusion_schedules.safetensors")
    compared = 0
    for theirs, ours in TABLES.items():
        if f"{name}.{theirs}" in expected:
            table = getattr(process, ours)
            assert table.dtype == torch.float64
            torch.testing.assert_close(table, expected[f"{name}.{theirs}"], atol=1e-12, rtol=0)
            compared += 1
    assert compared >= 6


def test_cosine_schedule_equals_the_references(golden):
    expected = golden("diffusion_schedules.safetensors")["squaredcos_cap_v2_1000.betas"]
    torch.testing.assert_close(GaussianDiffusion(schedule="cosine").betas, expected, atol=1e-12, rtol=0)


def test_scaled_linear_schedule_is_linear_in_its_root():
    betas = GaussianDiffusion(schedule="scaled_linear").betas
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(betas, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_fewer_timesteps_end_at_about_the_same_noise_level(schedule):
    full, short = GaussianDiffusion(1000, schedule), GaussianDiffusion(500, schedule)
    assert short.alphas_cumprod[-1].log() == pytest.approx(float(full.alphas_cumprod[-1].log()), rel=0.02)


def test_spaced_timesteps_equal_the_references(golden):
    for name, expected in golden("diffusion_spaced_timesteps.json").items():
        steps = int(name.removeprefix("ddim"))
        process = GaussianDiffusion().spaced(steps, constant_stride=name.startswith("ddim"))
        assert process.timesteps.tolist() == expected


def test_spacing_by_all_steps_is_the_full_process():
    full = GaussianDiffusion()
    for spaced in (full.spaced(1000), full.spaced(1000, constant_stride=True)):
        assert torch.equal(spaced.timesteps, full.timesteps)
        assert all(torch.equal(getattr(spaced, name), getattr(full, name)) for name in TABLES.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 1000))
def test_spaced_timesteps_ascend_and_keep_both_ends(steps):
    full = GaussianDiffusion()
    spaced = full.spaced(steps)
    assert spaced.timesteps[0] == 0 and spaced.timesteps[-1] == 999
    assert bool((spaced.timesteps.diff() > 0).all()) and len(spaced.timesteps) == steps
    torch.testing.assert_close(torch.cumprod(1 - spaced.betas, 0), full.alphas_cumprod[spaced.timesteps])


def test_model_receives_the_index_of_the_full_process():
    received = []

    def model(x, t, labels):
        received.append(t)
        return x

    process = GaussianDiffusion(variance="fixed_small").spaced(50).spaced(10)
    process.predict(model, torch.zeros(2, 4, 8, 8), torch.tensor([0, 9]), None)
    assert received[0].tolist() == [0, 999] and received[0].dtype == torch.int64


def test_noised_latents_and_posterior_equal_the_reference(golden):
    expected, process = golden("diffusion_losses.safetensors"), GaussianDiffusion()
    x_start, t = expected["x_start"], expected["t"]
    x_t = process.add_noise(x_start, expected["noise"], t)
    mean, log_variance = process.posterior(x_start, x_t, t)
    torch.testing.assert_close(x_t, expected["q_sample"], atol=1e-6, rtol=0)
    torch.testing.assert_close(mean, expected["q_post_mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(log_variance.expand_as(mean), expected["q_post_logvar"], atol=1e-6, rtol=0)
    x0, _ = process.to_x0_and_eps(expected["noise"], x_t, t)
    # 1 / sqrt(abar) multiplies float32's rounding by 157 at the last timestep.
    torch.testing.assert_close(x0, expected["pred_xstart_from_eps"], atol=1e-4, rtol=0)


def test_reverse_step_equals_the_reference(dit_a, golden):
    expected, process = golden("diffusion_losses.safetensors"), GaussianDiffusion()
    x_t, t = expected["q_sample"], expected["t"]
    with torch.no_grad():
        step = process.reverse_step(process.predict(dit_a, x_t, t, expected["y"]), x_t, t)
    for name, value in (
        ("mean", step.mean),
        ("log_variance", step.log_variance),
        ("variance", step.log_variance.exp()),
    ):
        torch.testing.assert_close(value, expected[f"p_mean_variance.noclip.{name}"], atol=1e-5, rtol=0)
    # The network's output may differ by 1e-5, as in its own test; here it is divided by sqrt(abar), 0.006 at the end.
    error = (step.x0 - expected["p_mean_variance.noclip.pred_xstart"]).abs().amax((1, 2, 3))
    assert (error <= 1e-5 / process.alphas_cumprod[t].sqrt()).all(), error


def test_training_losses_equal_the_reference(dit_a, golden):
    expected = golden("diffusion_losses.safetensors")
    with torch.no_grad():
        losses = GaussianDiffusion().training_losses(
            dit_a, expected["x_start_half"], expected["t"], expected["y"], expected["noise"]
        )
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[f"train.mse_vb.{name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_target_gives_back_latents_and_noise(prediction, schedule):
    process = GaussianDiffusion(schedule=schedule, prediction=prediction)
    latents, noise, t = batch()
    t = t.clamp(10, 900)  # at the ends one of the two is hidden below float32's precision
    x_t = process.add_noise(latents, noise, t)
    x0, eps = process.to_x0_and_eps(process.target(latents, noise, t), x_t, t)
    torch.testing.assert_close(x0, latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(eps, noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_noising_step_by_step_equals_one_jump_in_distribution(schedule, steps):
    """Both are linear in latents and independent noises: equal mean and variance make equal distributions.

    Row 0 carries the latents through all steps without noise; row k carries the noise of step k - 1 alone.
    """
    process = GaussianDiffusion(schedule=schedule).spaced(steps)
    x, impulses = torch.zeros(steps + 1, 1, 1, 1), torch.eye(steps + 1)
    x[0] = 1
    for step in range(steps):
        noise = impulses[step + 1].view(-1, 1, 1, 1)
        beta = process.betas[step]
        x = (1 - beta).sqrt() * x + beta.sqrt() * noise  # Ho et al. 2020, eq. 2
        mean, variance = float(x[0]), float(x[1:].double().square().sum())
        assert mean == pytest.approx(float(process.sqrt_alphas_cumprod[step]), rel=1e-4)
        assert variance == pytest.approx(float(1 - process.alphas_cumprod[step]), rel=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_posterior_is_the_product_of_its_two_sides(schedule):
    process = GaussianDiffusion(schedule=schedule)
    latents, noise, t = batch()
    x_t = process.add_noise(latents, noise, t)
    column = (..., None, None, None)
    beta, abar_prev = process.betas[t][column], process.alphas_cumprod_prev[t][column]
    precision = (1 - beta) / beta + 1 / (1 - abar_prev)
    mean = ((1 - beta).sqrt() / beta * x_t + abar_prev.sqrt() / (1 - abar_prev) * latents) / precision
    ours, log_variance = process.posterior(latents, x_t, t)
    torch.testing.assert_close(ours.double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_variance.double(), -precision.log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("variance", "extra", "table"),
    [
        ("learned_range", 1.0, "log_betas"),
        ("learned_range", -1.0, "log_variance_small"),
        ("fixed_small", None, "log_variance_small"),
        ("fixed_large", None, "log_betas"),
    ],
)
def test_variances_span_from_posterior_to_beta(variance, extra, table):
    process = GaussianDiffusion(variance=variance)
    latents, noise, t = batch()
    output = noise if extra is None else torch.cat([noise, torch.full_like(noise, extra)], dim=1)
    log_variance = process.reverse_step(output, latents, t).log_variance
    expected = getattr(process, table)[t].float().view(-1, 1, 1, 1).expand_as(latents)
    torch.testing.assert_close(log_variance, expected)


def test_variational_term_vanishes_for_the_true_posterior():
    latents, noise, t = batch()

    def oracle(x, t, labels):
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    losses = GaussianDiffusion().training_losses(oracle, latents, t, None, noise)
    assert losses["mse"].abs().max() == 0
    assert losses["vb"].abs().max() < 1e-4


def test_mean_gets_no_gradient_from_the_variational_term():
    latents, noise, t = batch()
    output = torch.randn(6, 8, 8, 8, requires_grad=True)
    losses = GaussianDiffusion().training_losses(lambda *_: output, latents, t, None, noise)
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert not gradient[:, :4].any() and gradient[:, 4:].any()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_losses_are_per_image_float32_and_add_up(prediction, variance, small_model):
    process = GaussianDiffusion(prediction=prediction, variance=variance)
    model = small_model(learn_sigma=variance == "learned_range")
    latents, noise, t = batch()
    t[0] = 0
    labels = torch.arange(6)
    losses = process.training_losses(model, latents.double(), t, labels, noise)
    assert all(value.shape == (6,) and value.dtype == torch.float32 for value in losses.values())
    assert all(bool(value.isfinite().all()) for value in losses.values())
    learned = losses["vb"] if variance == "learned_range" else 0
    torch.testing.assert_close(losses["loss"], losses["mse"] + learned)
    alone = process.training_losses(model, latents[:1], t[:1], labels[:1], noise[:1])
    torch.testing.assert_close(alone["loss"], losses["loss"][:1], rtol=1e-4, atol=1e-5)


def test_divergence_equals_torch_distributions():
    mean1, log_variance1, mean2, log_variance2 = torch.randn(4, 100)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (log_variance1 / 2).exp()),
        torch.distributions.Normal(mean2, (log_variance2 / 2).exp()),
    )
    torch.testing.assert_close(gaussian_kl(mean1, log_variance1, mean2, log_variance2), expected)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.5), (0.9, 0.05), (-1.2, 0.3)])
def test_probabilities_of_all_grey_levels_add_up_to_one(mean, scale):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
    total = discretized_log_likelihood(levels, torch.tensor(mean), log_scale).exp().sum()
    assert total == pytest.approx(1, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True, width=32))
def test_uniform_numbers_map_to_timesteps(steps, uniform):
    t = GaussianDiffusion().spaced(steps).sample_timesteps(torch.tensor([uniform], dtype=torch.float32))
    assert t.dtype == torch.int64 and t.item() == math.floor(uniform * steps) < steps


@pytest.mark.parametrize(
    ("call", "found", "expected", "advice"),
    [
        (lambda p, x: GaussianDiffusion(schedule="sqrt"), "'sqrt'", "one of linear, cosine", "Choose one"),
        (lambda p, x: GaussianDiffusion(prediction="noise"), "'noise'", "eps, x0, v", "Choose one"),
        (lambda p, x: GaussianDiffusion(variance="none"), "'none'", "learned_range", "Choose one"),
        (lambda p, x: GaussianDiffusion(weighting="snr"), "'snr'", "none, min_snr", "Choose one"),
        (lambda p, x: GaussianDiffusion(min_snr_gamma=0), "is 0", "above 0", "Use 5"),
        (lambda p, x: GaussianDiffusion(10), "is 10", "all signal in one step", "Use more timesteps"),
        (lambda p, x: p.spaced(0), "0 sampling steps", "expected 1 to 1000", "Change the number"),
        (lambda p, x: p.spaced(1001), "1001 sampling steps", "expected 1 to 1000", "Change the number"),
        (lambda p, x: p.spaced(600, constant_stride=True), "600 steps", "gives 500", "Choose 500"),
        (lambda p, x: p.add_noise(x, x[:1], torch.tensor([1, 2])), "(1, 4, 8, 8)", "shape", "Give one"),
        (lambda p, x: p.add_noise(x, x, torch.tensor([1])), "(1,)", "shape", "Give one timestep"),
        (lambda p, x: p.add_noise(x, x, torch.tensor([0, 1000])), "1000", "[0, 1000)", "sample_timesteps"),
        (lambda p, x: p.add_noise(x, x, torch.tensor([0.1, 0.2])), "float32", "integers", "sample_timesteps"),
        (lambda p, x: p.posterior(x, x, torch.tensor([-1, 5])), "-1", "[0, 1000)", "sample_timesteps"),
        (lambda p, x: p.predict(None, x, torch.tensor([-1, 5]), None), "-1", "[0, 1000)", "sample_timesteps"),
        (
            lambda p, x: p.convert_prediction(x, x, torch.tensor([5, 1000]), target="score"),
            "1000",
            "[0, 1000)",
            "sample_timesteps",
        ),
        (
            lambda p, x: p.training_losses(lambda *_: x, x, torch.tensor([1, 2]), None, x),
            "returns 4 channels",
            "expected 8",
            "Use learn_sigma",
        ),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(call, found, expected, advice):
    with pytest.raises(ValueError) as error:
        call(GaussianDiffusion(), torch.zeros(2, 4, 8, 8))
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)
