"""Averages reconstructed after training equal those that were tracked during training."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from dit.checkpoint import save_checkpoint, step_name
from dit.ema import PowerEMA, gamma_from_sigma_rel
from dit.posthoc_ema import Profile, profile_product, reconstruct_ema, reconstruction_weights
from dit.schedule import TrainingConfig
from dit.train import create_state
from raydit.errors import InvalidInput

STEPS, EVERY = 400, 20
PROFILES = st.builds(Profile, st.integers(1, 1000), st.floats(0.5, 60))


class Weights(nn.Module):
    """Weights of all kinds: a random walk, converging weights, frozen weights and a counter."""

    def __init__(self):
        super().__init__()
        self.wandering = nn.Parameter(torch.zeros(50))
        self.settling = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.full((4,), 0.7), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def advance(self, step):
        self.wandering += torch.randn(50) / STEPS**0.5
        self.settling.copy_(1 - torch.exp(-step / torch.tensor([5.0, 30.0, 200.0])))
        self.count += 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints with averages of widths 0.05 and 0.1, and tracked averages of other widths at each of them."""
    torch.manual_seed(0)
    folder, network = tmp_path_factory.mktemp("checkpoints"), Weights()
    state = create_state(network, TrainingConfig(steps=STEPS, ema_sigma_rels=(0.05, 0.1)))
    others = {sigma_rel: PowerEMA(network, sigma_rel) for sigma_rel in (0.04, 0.07, 0.15, 0.2)}
    checkpoints, tracked = [], {}
    for step in range(STEPS):
        network.advance(step)
        for average in (*state.averages.values(), *others.values()):
            average.update(network, step)
        state.step = step + 1
        if state.step % EVERY == 0:
            checkpoints.append(save_checkpoint(state, folder / step_name(state.step), {}, {}))
            for sigma_rel, average in others.items():
                copies = {name: value.clone() for name, value in average.state_dict().items()}
                tracked[sigma_rel, state.step] = copies
    return checkpoints, tracked


@settings(max_examples=50, deadline=None)
@given(PROFILES, PROFILES)
def test_the_inner_product_of_profiles_equals_its_integral(one, other):
    time = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * min(one.step, other.step)
    values = [(p.gamma + 1) / p.step * (time / p.step) ** p.gamma for p in (one, other)]
    integral = float((values[0] * values[1]).mean()) * min(one.step, other.step)
    assert profile_product(one, other) == pytest.approx(integral, rel=1e-4)
    assert profile_product(one, other) == profile_product(other, one)


@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.04, 2e-3), (0.07, 5e-4), (0.15, 2e-3), (0.2, 1e-2)])
def test_a_reconstructed_average_equals_one_tracked_during_training(run, sigma_rel, tolerance):
    checkpoints, tracked = run
    made, expected = reconstruct_ema(checkpoints, sigma_rel), tracked[sigma_rel, STEPS]
    assert made.keys() == expected.keys()
    for name in ("wandering", "settling"):
        torch.testing.assert_close(made[name], expected[name], atol=tolerance, rtol=0)
    # Far nearer than the stored averages are, between or beside which it lies.
    stored = [checkpoints[-1].weights(name)["wandering"] for name in ("ema_0.05", "ema_0.1")]
    nearest = min(float((average - expected["wandering"]).abs().max()) for average in stored)
    assert float((made["wandering"] - expected["wandering"]).abs().max()) < nearest / 20


def test_an_average_at_an_earlier_step_is_reconstructed_too(run):
    checkpoints, tracked = run
    made = reconstruct_ema(checkpoints, 0.07, step=300)
    torch.testing.assert_close(made["wandering"], tracked[0.07, 300]["wandering"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.05, STEPS), (0.1, STEPS), (0.05, EVERY), (0.1, 200)])
def test_a_stored_average_is_reconstructed_exactly(run, sigma_rel, step):
    checkpoints, _ = run
    stored = checkpoints[step // EVERY - 1].weights(f"ema_{sigma_rel}")
    made = reconstruct_ema(checkpoints, sigma_rel, step)
    torch.testing.assert_close(made["wandering"], stored["wandering"], atol=1e-6, rtol=0)


def test_constant_weights_are_reconstructed_exactly_and_counters_are_the_last(run):
    checkpoints, _ = run
    for few in (checkpoints[-1:], checkpoints[::7], checkpoints):
        made = reconstruct_ema(few, 0.15, few[-1].step)
        assert torch.equal(made["frozen"], torch.full((4,), 0.7))
        assert made["count"] == few[-1].step and made["count"].dtype == torch.int64
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in made.values())


def test_a_model_loads_the_reconstructed_average(run):
    checkpoints, _ = run
    model, made = Weights(), reconstruct_ema(checkpoints, 0.07)
    model.load_state_dict(made)
    assert torch.equal(model.wandering, made["wandering"])


@settings(max_examples=50, deadline=None)
@given(st.lists(PROFILES, min_size=1, max_size=12), st.floats(0.01, 0.25), st.floats(0.05, 1))
def test_coefficients_add_up_to_one_and_are_optimal(stored, sigma_rel, share):
    """The error of the fit is orthogonal to every change of the coefficients that keeps their sum."""
    newest = max(profile.step for profile in stored)
    target = Profile(share * newest, gamma_from_sigma_rel(sigma_rel))
    weights = reconstruction_weights(stored, target)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    slopes = [
        sum(float(w) * profile_product(one, other) for w, other in zip(weights, stored, strict=True))
        - profile_product(one, target)
        for one in stored
    ]
    largest = max(profile_product(one, one) for one in (*stored, target))
    assert max(slopes) - min(slopes) <= 1e-6 * largest * (1 + float(weights.abs().max()))


def test_passing_a_checkpoint_twice_changes_nothing():
    once = [Profile(step, gamma) for step in (50, 100) for gamma in (7.0, 17.0)]
    target = Profile(100, 12.0)
    weights = reconstruction_weights([*once, once[-1]], target)
    merged = torch.cat([weights[:3], weights[3:].sum(0, keepdim=True)])
    torch.testing.assert_close(merged, reconstruction_weights(once, target), atol=1e-9, rtol=0)


def test_errors_say_what_was_found_and_expected_and_what_to_do(run, tmp_path):
    checkpoints, _ = run
    with pytest.raises(ValueError, match=r"at step 401 was requested .* up to step 400, .*\. Choose an earlier"):
        reconstruct_ema(checkpoints, 0.07, step=STEPS + 1)
    with pytest.raises(ValueError, match=r"sigma_rel is 0.5, expected"):
        reconstruct_ema(checkpoints, 0.5)
    state = create_state(Weights(), TrainingConfig(steps=1))
    plain = save_checkpoint(state, tmp_path / step_name(0), {}, {})
    with pytest.raises(ValueError, match=r"no power-function averages in .*step_0000000, expected .*ema_sigma_rels"):
        reconstruct_ema([plain], 0.07)
    with pytest.raises(ValueError, match="in no checkpoints"):
        reconstruct_ema([], 0.07)


def test_a_checkpoint_at_step_0_adds_nothing(run, tmp_path):
    checkpoints, _ = run
    network = Weights()
    state = create_state(network, TrainingConfig(steps=STEPS, ema_sigma_rels=(0.05, 0.1)))
    first = save_checkpoint(state, tmp_path / step_name(0), {}, {})
    made, expected = reconstruct_ema([first, *checkpoints], 0.07), reconstruct_ema(checkpoints, 0.07)
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match=r"no power-function averages in .*, of a step after 0"):
        reconstruct_ema([first], 0.07)


def test_files_that_the_checkpoint_does_not_list_or_that_changed_are_not_used(tmp_path):
    state = create_state(Weights(), TrainingConfig(steps=STEPS, ema_sigma_rels=(0.05, 0.1)))
    state.step = 5
    checkpoint = save_checkpoint(state, tmp_path / step_name(5), {}, {})
    expected = reconstruct_ema([checkpoint], 0.07)
    other = {name: value + 1 for name, value in expected.items()}
    save_file(other, checkpoint.path / "ema_0.15.safetensors")
    assert torch.equal(reconstruct_ema([checkpoint], 0.07)["wandering"], expected["wandering"])
    save_file(other, checkpoint.path / "ema_0.05.safetensors")
    with pytest.raises(InvalidInput, match=r"ema_0.05.safetensors: the file changed after it was written"):
        reconstruct_ema([checkpoint], 0.07)


def test_the_averages_of_adapters_are_refused(run):
    checkpoints, _ = run
    base = {"uri": "/base", "file": "ema.safetensors", "sha256": "0", "digest": "0"}
    adapter = dataclasses.replace(checkpoints[0], config={**checkpoints[0].config, "base": base})
    with pytest.raises(
        InvalidInput, match=r"found an adapter in .*step_0000020, .* expected checkpoints that hold all"
    ):
        reconstruct_ema([adapter], 0.07)
