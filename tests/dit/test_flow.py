import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.flow import FlowMatching


def test_path_and_velocity_equal_the_reference(golden):
    expected, flow = golden("sit_linear.safetensors"), FlowMatching()
    latents, noise = expected["x1"], expected["x0"]  # the reference's x1 is the data
    x_t = flow.add_noise(latents, noise, expected["t"])
    torch.testing.assert_close(x_t, expected["Linear.xt"], atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.velocity(latents, noise), expected["Linear.ut"], atol=1e-6, rtol=0)


def test_training_losses_equal_the_reference(dit_a, golden):
    expected = golden("sit_linear.safetensors")
    with torch.no_grad():
        losses = FlowMatching().training_losses(
            dit_a, expected["x1"], expected["loss.t_draw"], expected["y"], expected["loss.x0_draw"]
        )
    assert losses.keys() == {"loss", "mse"}
    for value in losses.values():
        torch.testing.assert_close(value, expected["loss.Linear.velocity.None"], atol=1e-5, rtol=0)


def test_path_leads_from_noise_to_data():
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    flow = FlowMatching()
    assert torch.equal(flow.add_noise(latents, noise, torch.zeros(2)), noise)
    assert torch.equal(flow.add_noise(latents, noise, torch.ones(2)), latents)


def test_velocity_is_the_paths_derivative():
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    flow, t = FlowMatching(), torch.tensor([0.1, 0.4])
    change = flow.add_noise(latents, noise, t + 0.5) - flow.add_noise(latents, noise, t)
    torch.testing.assert_close(change / 0.5, flow.velocity(latents, noise), atol=1e-5, rtol=1e-5)


def test_perfect_velocity_has_no_loss():
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    losses = FlowMatching().training_losses(lambda x, t, y: latents - noise, latents, torch.rand(3), None, noise)
    assert torch.equal(losses["loss"], torch.zeros(3))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=5),
    st.sampled_from(["uniform", "logit_normal"]),
)
def test_uniform_numbers_map_to_ascending_times_in_the_unit_interval(uniform, time):
    t = FlowMatching(time).sample_timesteps(torch.tensor(sorted(uniform), dtype=torch.float32))
    assert t.dtype == torch.float32
    assert bool(((t >= 0) & (t <= 1)).all()) and bool((t.diff() >= 0).all())


def test_logit_normal_times_have_normal_logits():
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    logits = torch.logit(FlowMatching("logit_normal").sample_timesteps(uniform).double())
    assert float(logits.mean()) == pytest.approx(0, abs=1e-4)
    assert float(logits.std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(torch.special.ndtr(logits), uniform, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "found", "expected", "advice"),
    [
        (lambda f, x: FlowMatching("cosine"), "'cosine'", "uniform or logit_normal", "Choose one"),
        (lambda f, x: f.add_noise(x, x[:1], torch.zeros(2)), "(1, 4, 8, 8)", "shape", "Give one time"),
        (lambda f, x: f.add_noise(x, x, torch.zeros(3)), "(3,)", "shape", "Give one time per image"),
        (lambda f, x: f.add_noise(x, x, torch.tensor([0.0, 999.0])), "999.0", "[0, 1]", "sample_timesteps"),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(call, found, expected, advice):
    with pytest.raises(ValueError) as error:
        call(FlowMatching(), torch.zeros(2, 4, 8, 8))
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)
