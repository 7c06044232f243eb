import pytest
import torch
from torch import nn

from dit.ema import EMA


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


def test_frozen_parameters_stay_bit_equal_and_buffers_are_copied():
    model = Scalar()
    ema = EMA(model)
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


def test_model_takes_the_average(small_model):
    model = small_model()
    ema = EMA(small_model(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model, 1)
    ema.copy_to(model)
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in model.state_dict().items())


def test_errors_tell_found_expected_and_what_to_do(small_model):
    with pytest.raises(ValueError, match=r"decay is 1.5, but it must be in \[0, 1\): use 0.9999"):
        EMA(Scalar(), decay=1.5)
    ema = EMA(small_model())
    with pytest.raises(ValueError, match="blocks.2.*must be equal: load a checkpoint of the same model"):
        ema.load_state_dict(EMA(small_model(depth=3)).state_dict())
    with pytest.raises(ValueError, match="x_embedder.*must be equal"):
        ema.load_state_dict(EMA(small_model(in_channels=3, learn_sigma=False)).state_dict())
