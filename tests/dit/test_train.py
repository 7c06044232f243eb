"""The training loop, compared with the formulas of AdamW, clipping and EMA written out by hand."""

import math
import time

import pytest
import torch
from torch import nn

from dit.metrics_window import MetricsWindow
from dit.schedule import TrainingConfig, learning_rate
from dit.train import create_state, train, train_step

NOTHING = {"report": lambda step, metrics: None, "save": lambda state: None}


def linear_model():
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def make_batches(count, size=4):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)) for _ in range(count)
    ]


def squared_error(model, batch):
    inputs, targets = batch
    return {"loss": (model(inputs) - targets).square().mean()}


def config(**settings):
    return TrainingConfig(**{"steps": 5, "global_batch_size": 4, "learning_rate": 0.05, **settings})


def by_hand(batches, settings):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), norm clipping and EMA, in float64 and without autograd."""
    model = linear_model()
    values = [model.weight.detach().double(), model.bias.detach().double()]
    firsts, seconds = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    averages = [value.clone() for value in values]
    beta1, beta2 = settings.betas
    losses, norms = [], []
    for step, (inputs, targets) in enumerate(batches):
        inputs, targets = inputs.double(), targets.double()
        error = inputs @ values[0].T + values[1] - targets
        losses.append(float(error.square().mean()))
        gradients = [2 * error.T @ inputs / error.numel(), 2 * error.sum(0) / error.numel()]
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        norms.append(norm)
        if settings.grad_clip:
            gradients = [gradient * min(1.0, settings.grad_clip / (norm + 1e-6)) for gradient in gradients]
        rate = learning_rate(settings, step)
        decay = min(settings.ema_decay, (1 + step) / (10 + step)) if settings.ema_warmup else settings.ema_decay
        for i, gradient in enumerate(gradients):
            firsts[i] = beta1 * firsts[i] + (1 - beta1) * gradient
            seconds[i] = beta2 * seconds[i] + (1 - beta2) * gradient**2
            mean = firsts[i] / (1 - beta1 ** (step + 1))
            square = seconds[i] / (1 - beta2 ** (step + 1))
            values[i] = values[i] * (1 - rate * settings.weight_decay) - rate * mean / (square.sqrt() + 1e-8)
            averages[i] = decay * averages[i] + (1 - decay) * values[i]
    return values, averages, losses, norms


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(grad_clip=0.5, weight_decay=0.1, betas=(0.8, 0.95), ema_decay=0.9),
        config(lr_schedule="linear", warmup_steps=2, grad_clip=1.0, ema_decay=0.99, ema_warmup=True),
    ],
)
def test_five_steps_equal_the_formulas(settings):
    batches = make_batches(5)
    reports = []
    state = create_state(linear_model(), config=settings)
    train(
        state,
        batches,
        squared_error,
        settings_with(settings, log_every=1),
        report=lambda step, metrics: reports.append(metrics),
        save=lambda state: None,
    )
    values, averages, losses, norms = by_hand(batches, settings)
    ema = state.ema.state_dict()
    for name, value, average in zip(("weight", "bias"), values, averages, strict=True):
        torch.testing.assert_close(state.network.state_dict()[name].double(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ema[name].double(), average, rtol=1e-5, atol=1e-6)
    assert [report["loss"] for report in reports] == pytest.approx(losses, rel=1e-5)
    assert [report["grad_norm"] for report in reports] == pytest.approx(norms, rel=1e-5)
    assert [report["lr"] for report in reports] == pytest.approx([learning_rate(settings, s) for s in range(5)])


def settings_with(settings, **changes):
    return TrainingConfig(**{**vars(settings), **changes})


def test_reports_and_checkpoints_are_made_at_their_steps_and_after_the_last():
    settings = config(steps=7, log_every=3, checkpoint_every=2)
    events = []
    state = train(
        create_state(linear_model(), settings),
        make_batches(20),
        squared_error,
        settings,
        report=lambda step, metrics: events.append(("report", step)),
        save=lambda state: events.append(("save", state.step)),
    )
    assert state.step == 7
    # At checkpoints too: a resumed run then reports the numbers of an unbroken one.
    assert [step for kind, step in events if kind == "report"] == [2, 3, 4, 6, 7]
    assert [step for kind, step in events if kind == "save"] == [2, 4, 6, 7]
    assert events[-2:] == [("report", 7), ("save", 7)]


def test_a_last_step_at_which_reports_are_due_is_reported_and_saved_once():
    settings = config(steps=4, log_every=2, checkpoint_every=2)
    events = []
    train(
        create_state(linear_model(), settings),
        make_batches(4),
        squared_error,
        settings,
        report=lambda step, metrics: events.append(("report", step)),
        save=lambda state: events.append(("save", state.step)),
    )
    assert events == [("report", 2), ("save", 2), ("report", 4), ("save", 4)]


def test_no_batch_is_drawn_beyond_the_last_step():
    batches = iter(make_batches(10))
    train(create_state(linear_model(), config()), batches, squared_error, config(), **NOTHING)
    assert len(list(batches)) == 5


def test_a_finished_training_takes_no_more_steps():
    state = train(create_state(linear_model(), config()), make_batches(5), squared_error, config(), **NOTHING)
    weight = state.network.weight.detach().clone()
    train(state, make_batches(3), squared_error, config(), **NOTHING)
    assert state.step == 5
    assert torch.equal(state.network.weight, weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(bad):
    batches = make_batches(5)
    batches[2][1][0, 0] = bad
    state = create_state(linear_model(), config())
    with pytest.raises(
        FloatingPointError,
        match=r"step 3: loss (nan|inf), gradient norm .*those of step 2, expected finite .*Lower",
    ):
        train(state, batches, squared_error, config(), **NOTHING)
    same = train(create_state(linear_model(), config()), batches[:2], squared_error, config(), **NOTHING)
    assert state.step == 2
    assert torch.equal(state.network.weight, same.network.weight)
    assert torch.equal(state.ema.state_dict()["weight"], same.ema.state_dict()["weight"])


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_finite():
    state = create_state(linear_model(), config())
    before = state.network.weight.detach().clone()

    def root_at_zero(model, batch):
        return {"loss": (0 * model(batch[0])).sum().sqrt()}

    with pytest.raises(FloatingPointError, match="step 1: loss 0.0"):
        train_step(state, make_batches(1)[0], root_at_zero, config())
    assert torch.equal(state.network.weight, before)


def test_frozen_parameters_do_not_change():
    network = linear_model()
    network.bias.requires_grad_(False)
    before = network.bias.detach().clone()
    settings = config(weight_decay=0.5)
    state = train(create_state(network, settings), make_batches(5), squared_error, settings, **NOTHING)
    assert torch.equal(state.network.bias, before)
    assert torch.equal(state.ema.state_dict()["bias"], before)


def test_the_forward_pass_uses_the_wrapper_and_averages_have_the_networks_names():
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, inputs):
            calls.append(len(inputs))
            return self.module(inputs)

    state = create_state(linear_model(), config(), wrap=Wrapper)
    train(state, make_batches(5), squared_error, config(), **NOTHING)
    assert calls == [4] * 5
    assert set(state.ema.state_dict()) == {"weight", "bias"}


def test_reported_metrics_are_the_means_since_the_last_report():
    window = MetricsWindow(images_per_step=4)
    for value in (1.0, 2.0, 6.0):
        window.add({"loss": torch.tensor(value), "lr": 0.5})
    means = window.means()
    assert means["loss"] == 3.0 and means["lr"] == 0.5
    assert means["images_per_second"] > 0
    window.add({"loss": torch.tensor(10.0), "lr": 0.25})
    assert window.means()["loss"] == 10.0


def test_the_time_of_a_checkpoint_counts_towards_the_next_report():
    window = MetricsWindow(images_per_step=4)
    window.add({"loss": 1.0})
    assert window.means()["checkpoint_wait"] == 0.0
    with window.time_saving():
        time.sleep(0.02)
    window.add({"loss": 1.0})
    assert 0.0 < window.means()["checkpoint_wait"] <= 1.0
    window.add({"loss": 1.0})
    assert window.means()["checkpoint_wait"] == 0.0
