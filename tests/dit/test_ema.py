import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dit.ema import EMA, PowerEMA, gamma_from_sigma_rel, power_decay
from dit.schedule import LARGEST_SIGMA_REL


class Scalar(nn.Module):
    """One parameter, one frozen parameter, one persistent and one temporary buffer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((2,), 0.1, dtype=dtype), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def set(self, value):
        with torch.no_grad():
            self.weight.fill_(value)
            self.count.fill_(int(value))


def test_average_follows_the_closed_form():
    model, decay, target = Scalar(), 0.9, 2.0
    ema = EMA(model, decay=decay)
    model.set(target)
    for n in range(1, 21):
        ema.update(model, n)
        expected = target * (1 - decay**n)
        torch.testing.assert_close(ema.state_dict()["weight"], torch.full((3,), expected))


def test_warmup_follows_the_closed_form():
    model, values = Scalar(), [1.0, -2.0, 0.5, 3.0]
    ema, expected = EMA(model, decay=0.3, warmup=True), 0.0
    for step, value in enumerate(values, start=1):
        model.set(value)
        ema.update(model, step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.state_dict()["weight"], torch.full((3,), expected))


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_power_average_is_the_integral_of_the_weights_over_their_profile(sigma_rel):
    """Weights are constant between steps, theta_n for n - 1 < tau <= n, and weighted by tau^gamma."""
    model, values = Scalar(), torch.randn(60, dtype=torch.float64)
    ema, gamma = PowerEMA(model, sigma_rel), gamma_from_sigma_rel(sigma_rel)
    for step, value in enumerate(values.tolist()):
        model.set(value)
        ema.update(model, step)
        edges = torch.arange(step + 2, dtype=torch.float64) / (step + 1)
        expected = (values[: step + 1] * (edges ** (gamma + 1)).diff()).sum()
        torch.testing.assert_close(ema.state_dict()["weight"].double(), expected.expand(3), rtol=1e-5, atol=1e-6)


def test_power_average_forgets_the_start_and_begins_with_the_first_step():
    model = Scalar()
    ema = PowerEMA(model, 0.1)
    model.set(3.0)
    ema.update(model, 0)
    assert torch.equal(ema.state_dict()["weight"], model.weight)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_the_profile_of_the_decays_has_the_requested_relative_width(sigma_rel):
    """The width is the standard deviation of the steps that the decays average over, for many steps."""
    steps = 4000
    keeps = torch.tensor(
        [power_decay(t, gamma_from_sigma_rel(sigma_rel)) for t in range(1, steps + 1)], dtype=torch.float64
    )
    later = torch.cat([keeps.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    weights = (1 - keeps) * later
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    mean = (weights * time).sum()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float((weights * (time - mean).square()).sum().sqrt()) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_equal_those_of_the_paper(sigma_rel, gamma):
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=0.005)


def standard_deviation(gamma):
    """Return that of the density proportional to tau^gamma on [0, 1]. Source: Karras et al. 2024, section 3.1."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, LARGEST_SIGMA_REL))
def test_profile_has_the_requested_standard_deviation(sigma_rel):
    assert standard_deviation(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.02, 300))
def test_exponent_is_recovered_from_the_standard_deviation(gamma):
    assert gamma_from_sigma_rel(standard_deviation(gamma)) == pytest.approx(gamma, rel=1e-6)


def test_frozen_parameters_stay_bit_equal_and_buffers_are_copied():
    for ema in (EMA(Scalar()), PowerEMA(Scalar(), 0.05)):
        check_frozen_and_buffers(ema)


def check_frozen_and_buffers(ema):
    model = Scalar()
    for step in range(50):
        model.set(step)
        ema.update(model, step)
    assert torch.equal(ema.state_dict()["frozen"], model.frozen)
    assert ema.state_dict()["count"] == 49
    assert ema.state_dict().keys() == model.state_dict().keys()


def test_average_of_a_bfloat16_model_is_float32():
    model = Scalar(dtype=torch.bfloat16)
    ema = EMA(model, decay=0.9999)
    model.set(1.0)
    for step in range(10):
        ema.update(model, step)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((3,), 1 - 0.9999**10), rtol=1e-4, atol=0)
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_average_does_not_share_memory_with_the_model():
    model = Scalar()
    ema = EMA(model)
    model.set(5.0)
    assert not ema.state_dict()["weight"].any()


def test_resumed_average_continues_bit_for_bit():
    model, ema, again = Scalar(), EMA(Scalar()), EMA(Scalar())
    values = torch.randn(8).tolist()
    for step, value in enumerate(values):
        if step == 4:
            again.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
        model.set(value)
        ema.update(model, step)
        if step >= 4:
            again.update(model, step)
    assert torch.equal(ema.state_dict()["weight"], again.state_dict()["weight"])


def test_model_loads_the_average(small_model):
    model = small_model()
    ema = EMA(small_model(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model, 1)
    ema.copy_to(model)
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in model.state_dict().items())


def test_errors_say_what_was_found_and_expected_and_what_to_do(small_model):
    with pytest.raises(ValueError, match=r"ema_decay is 1.5, expected a number in \[0, 1\). Use 0.9999"):
        EMA(Scalar(), decay=1.5)
    for sigma_rel in (0.0, -0.05, 0.3):
        with pytest.raises(ValueError, match=rf"sigma_rel is {sigma_rel}, expected .* at most 0.288.*\. Use 0.05"):
            PowerEMA(Scalar(), sigma_rel)
    ema = EMA(small_model())
    with pytest.raises(ValueError, match="blocks.2.*expected equal names and shapes. Load a checkpoint"):
        ema.load_state_dict(EMA(small_model(depth=3)).state_dict())
    with pytest.raises(ValueError, match="x_embedder.*expected equal names and shapes"):
        ema.load_state_dict(EMA(small_model(in_channels=3, learn_sigma=False)).state_dict())
