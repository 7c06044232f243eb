import math

import pytest

from dit.schedule import TrainingConfig, learning_rate

PEAK = 0.1


def config(**settings):
    return TrainingConfig(**{"steps": 100, "learning_rate": PEAK, **settings})


def test_constant_rate_is_the_peak_throughout():
    assert {learning_rate(config(), step) for step in range(100)} == {PEAK}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_linearly_to_the_peak(schedule):
    rates = [learning_rate(config(warmup_steps=10, lr_schedule=schedule), step) for step in range(11)]
    assert rates[:10] == pytest.approx([PEAK * n / 10 for n in range(1, 11)])
    assert rates[9] == rates[10] == PEAK


@pytest.mark.parametrize("warmup", [0, 20])
def test_linear_decay_falls_linearly_to_zero(warmup):
    settings = config(warmup_steps=warmup, lr_schedule="linear")
    rates = [learning_rate(settings, step) for step in range(warmup, 101)]
    assert rates == pytest.approx([PEAK * n / (100 - warmup) for n in range(100 - warmup, -1, -1)])
    assert rates[0] == PEAK and rates[-1] == 0


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine_decay_is_half_way_at_its_middle_and_zero_at_its_end(warmup):
    settings = config(warmup_steps=warmup, lr_schedule="cosine")
    quarter, middle = warmup + (100 - warmup) // 4, warmup + (100 - warmup) // 2
    assert learning_rate(settings, warmup) == PEAK
    assert learning_rate(settings, quarter) == pytest.approx(PEAK * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(settings, middle) == pytest.approx(PEAK / 2)
    assert learning_rate(settings, 100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_training_that_consists_of_warmup_ends_at_the_peak(schedule):
    settings = config(warmup_steps=100, lr_schedule=schedule)
    assert learning_rate(settings, 99) == PEAK


def test_warmup_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps = 101 is longer than .*steps = 100\. Lower warmup_steps"):
        config(warmup_steps=101)


def test_a_repeated_width_of_averages_is_refused():
    with pytest.raises(
        ValueError,
        match=r"ema_sigma_rels = \[0.05, 0.05\] contains a width twice, .*Remove one",
    ):
        config(ema_sigma_rels=(0.05, 0.05))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_constant_extension_stays_at_the_rate_of_the_last_step(schedule):
    planned = config(steps=60, warmup_steps=10, lr_schedule=schedule)
    extended = config(warmup_steps=10, lr_schedule=schedule, extension="constant", earlier_ends=(60,))
    assert [learning_rate(extended, step) for step in range(60)] == [learning_rate(planned, step) for step in range(60)]
    last = {
        "constant": PEAK,
        "linear": PEAK / 50,
        "cosine": PEAK * (1 + math.cos(math.pi * 49 / 50)) / 2,
    }[schedule]
    assert [learning_rate(extended, step) for step in range(60, 101)] == pytest.approx([last] * 41, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_extension_is_the_schedule_again_over_the_steps_that_were_added(schedule):
    extended = config(warmup_steps=10, lr_schedule=schedule, extension="warmup", earlier_ends=(40, 60))
    rates = [learning_rate(extended, step) for step in range(100)]
    parts = [config(steps=steps, warmup_steps=10, lr_schedule=schedule) for steps in (40, 20, 40)]
    assert rates == [learning_rate(part, step) for part in parts for step in range(part.steps)]
    if schedule == "linear":  # in closed form
        assert rates[60:72] == pytest.approx([PEAK * n / 10 for n in range(1, 11)] + [PEAK, PEAK * 29 / 30])
        assert learning_rate(extended, 100) == 0


def test_a_planned_extension_is_the_schedule_of_all_steps():
    settings = {"warmup_steps": 10, "lr_schedule": "linear"}
    rates = [learning_rate(config(extension="planned", **settings), step) for step in range(101)]
    assert rates == [learning_rate(config(**settings), step) for step in range(101)]


@pytest.mark.parametrize(
    "settings",
    [
        {"extension": "constant"},
        {"extension": "planned", "earlier_ends": (60,)},
        {"earlier_ends": (60,)},
        {"extension": "warmup", "earlier_ends": (60, 50)},
        {"extension": "constant", "earlier_ends": (100,)},
        {"extension": "warmup", "earlier_ends": (95,), "warmup_steps": 10},
    ],
)
def test_an_extension_without_a_plan_is_refused(settings):
    with pytest.raises(ValueError, match="earlier_ends: found"):
        config(**settings)
