"""Steps that are launched before the host knows whether earlier gradients are finite, compared with a plain loop."""

import copy
import math

import pytest
import torch
from torch import nn

from dit.checkpoint import load_checkpoint, restore, save_checkpoint
from dit.ema import EMA, power_decay
from dit.optimizer import clip_gradients
from dit.schedule import TrainingConfig, learning_rate
from dit.snapshot import take_snapshot
from dit.train import NonFiniteError, create_state, default_verdict_lag, train

STEPS, BATCH = 9, 4
LAGS = [0, 1, 2]
CONFIG = TrainingConfig(
    steps=STEPS,
    global_batch_size=BATCH,
    learning_rate=0.05,
    lr_schedule="cosine",
    warmup_steps=3,
    grad_clip=0.5,
    weight_decay=0.1,
    ema_warmup=True,
    ema_sigma_rels=(0.1,),
    log_every=2,
    checkpoint_every=4,
)
POISONED = {
    "none": (),
    "the first": (0,),
    "one": (4,),
    "several in a row": (1, 2, 4, 5, 6),
    "before a checkpoint": (3,),
    "after a checkpoint": (4, 5),
    "the last": (8, 9),
}


class Network(nn.Module):
    """A network with a persistent buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, inputs):
        return self.scale * self.linear(inputs)


def new_state():
    torch.manual_seed(1)
    return create_state(Network(), CONFIG)


def make_batches(poisoned, count=STEPS + 6):
    generator = torch.Generator().manual_seed(2)
    made = [tuple(torch.randn(BATCH, n, generator=generator) for n in (3, 5)) for _ in range(count)]
    for index in poisoned:
        made[index][0][1, 2] = torch.nan
    return made


def squared_error(model, batch):
    return {"loss": (model(batch[0]) - batch[1]).square().mean()}


def bits(tensors):
    """Return dtype, shape and bytes of tensors by name, which are equal where the tensors are equal to the bit."""
    return {
        name: (value.dtype, value.shape, value.detach().numpy().tobytes()) for name, value in sorted(tensors.items())
    }


def content(state):
    """Return what a checkpoint of a state holds."""
    snapshot = take_snapshot(state)
    files = {name: bits(tensors) for name, tensors in snapshot.weights.items()}
    return {"step": state.step, "batches": state.batches, "optimizer": bits(snapshot.optimizer), **files}


def plain_loop(poisoned):
    """The same training by a loop that reads every norm at once, with the list functions of averages."""
    torch.manual_seed(1)
    network, events = Network(), []
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), betas=CONFIG.betas, weight_decay=CONFIG.weight_decay, fused=True)
    gamma = create_state(Network(), CONFIG).power_emas["ema_0.1"].gamma
    averages = {name: {key: value.detach().clone() for key, value in parameters.items()} for name in ("ema", "ema_0.1")}
    step, window = 0, []
    for number, batch in enumerate(make_batches(poisoned), start=1):
        loss = squared_error(network, batch)["loss"]
        loss.backward()
        norm, lr = nn.utils.clip_grad_norm_(parameters.values(), CONFIG.grad_clip), learning_rate(CONFIG, step)
        if not norm.isfinite():
            optimizer.zero_grad()
            events.append(("skipped", step, number, str(NonFiniteError(step, float(loss.detach()), float(norm), lr))))
            continue
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        decays = (min(CONFIG.ema_decay, (1 + step) / (10 + step)), power_decay(step + 1, gamma))
        for average, decay in zip(averages.values(), decays, strict=True):
            torch._foreach_lerp_(list(average.values()), [value.detach() for value in parameters.values()], 1 - decay)
        step += 1
        window.append(loss.detach())
        if step % 2 == 0 or step == STEPS:
            events.append(("report", step, float(sum(window)) / len(window)))
            window = []
        if step % 4 == 0 or step == STEPS:
            weights = {"model": parameters, **averages}
            moments = {f"{kind}/{k}": v for k, p in parameters.items() for kind, v in optimizer.state[p].items()}
            files = {name: bits(each | {"scale": network.scale}) for name, each in weights.items()}
            events.append(("save", {"step": step, "batches": number, "optimizer": bits(moments), **files}))
        if step == STEPS:
            return events
    raise AssertionError("too few batches")


def run(state, batches, events, **options):
    """Train, and append what the loop says to `events`: reports, checkpoints and skipped batches."""

    def skip(error, batch):
        events.append(("skipped", error.step, state.batches, str(error)))

    hooks = {
        "report": lambda step, metrics: events.append(("report", step, metrics["loss"])),
        "save": lambda state: events.append(("save", content(state))),
        "on_nonfinite": skip,
    }
    return train(state, batches, squared_error, CONFIG, **(hooks | options))


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("poisoned", POISONED.values(), ids=POISONED)
def test_any_lag_gives_what_a_loop_gives_that_looks_at_every_gradient_first(lag, poisoned):
    events = []
    run(new_state(), make_batches(poisoned), events, verdict_lag=lag)
    assert events == plain_loop(poisoned)


@pytest.mark.parametrize("lag", LAGS)
def test_validation_finds_the_state_of_its_step(lag):
    def validated(lag):
        states = []
        options = {"validate": lambda state: states.append(content(state)), "validate_every": 2}
        run(new_state(), make_batches((1, 5)), [], verdict_lag=lag, **options)
        return states

    states = validated(lag)
    assert [state["step"] for state in states] == [2, 4, 6, 8, 9]
    assert states == validated(0)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("stop_after", range(1, STEPS + 5))
def test_a_stop_after_any_batch_saves_the_same_and_resumes_to_the_same(lag, stop_after, tmp_path):
    poisoned = (0, 3, 4, 7)

    def stopped(lag):
        calls, events = iter(range(1, 99)), []
        state = run(
            new_state(), make_batches(poisoned), events, verdict_lag=lag, stop=lambda: next(calls) == stop_after
        )
        return state, events

    state, events = stopped(lag)
    assert events == stopped(0)[1]
    saved = [event[1] for event in events if event[0] == "save"]
    if not saved:
        assert state.step == 0
        return
    assert saved[-1]["step"] == state.step
    resumed = restore(new_state(), save_checkpoint(state, tmp_path / "stopped", {}, {}))
    resumed.open_window, rest = state.open_window, []
    run(resumed, make_batches(poisoned)[state.batches :], rest, verdict_lag=lag)
    whole = plain_loop(poisoned)
    if state.open_window is not None:
        events.pop()  # the checkpoint of the stop
    if state.step < STEPS:
        assert events + rest == whole


@pytest.mark.parametrize("lag", LAGS)
def test_an_error_leaves_the_weights_of_the_last_step(lag):
    state, clean = new_state(), new_state()
    with pytest.raises(NonFiniteError, match="step 6: .*the weights are still those of step 5"):
        run(state, make_batches((5,)), [], verdict_lag=lag, on_nonfinite=raise_error)
    run(clean, make_batches(())[:5], [])
    assert state.batches == 6
    state.batches = 5
    assert content(state) == content(clean)
    run(state, make_batches(())[5:], [], verdict_lag=lag)  # nothing of the error is left behind
    run(clean, make_batches(())[5:], [])
    assert content(state) == content(clean)


def raise_error(error, batch):
    raise error


@pytest.mark.parametrize("lag", LAGS)
def test_a_rollback_goes_on_with_the_batch_after_the_last_judged_one(lag, tmp_path):
    """The batches that were in flight are taken again."""
    batches, events = make_batches((5, 6, 8), STEPS + 10), []
    state = new_state()

    def save(state):
        events.append(("save", content(state)))
        save_checkpoint(state, tmp_path / f"{state.step}", {}, {})

    def roll_back(error, batch):
        events.append(("skipped", error.step, state.batches))
        if batch is batches[6]:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run(state, batches, events, verdict_lag=lag, save=save, on_nonfinite=roll_back)
    assert (state.step, state.batches) == (5, 7)
    batches_taken = state.batches
    restore(state, load_checkpoint(tmp_path / "4"))
    state.batches = batches_taken
    run(state, batches[batches_taken:], events, verdict_lag=lag, save=save, on_nonfinite=roll_back)
    expected = new_state()
    run(expected, [*batches[:4], batches[7], *batches[9:]], [])
    assert [event[1:] for event in events if event[0] == "skipped"] == [(5, 6), (5, 7), (5, 9)]
    assert (state.step, state.batches) == (STEPS, STEPS + 4)
    state.batches = expected.batches
    assert content(state) == content(expected)


def test_a_rollback_to_a_checkpoint_without_moments_is_as_a_start_from_it(tmp_path):
    """Such as the one that a training writes before its first step."""
    first = take_snapshot(new_state())
    first.optimizer.clear()
    checkpoint = save_checkpoint(first, tmp_path / "first", {}, {})
    later = run(new_state(), make_batches(())[:3], [])
    rolled_back, started = restore(later, checkpoint), restore(new_state(), checkpoint)
    for state in (rolled_back, started):
        run(state, make_batches(())[3:], [])
    assert content(rolled_back) == content(started)


@pytest.mark.parametrize("lag", LAGS)
def test_batches_that_were_skipped_in_a_row_are_counted_across_a_stop(lag, tmp_path):
    def counted(state, batches, **options):
        counts = []
        run(
            state,
            batches,
            [],
            verdict_lag=lag,
            on_nonfinite=lambda error, batch: counts.append(error.skipped),
            **options,
        )
        return counts

    poisoned = (2, 3, 4, 6)
    calls, state = iter(range(1, 99)), new_state()
    before = counted(state, make_batches(poisoned), stop=lambda: next(calls) == 4)
    resumed = restore(new_state(), save_checkpoint(state, tmp_path / "stopped", {}, {}))
    after = counted(resumed, make_batches(poisoned)[resumed.batches :])
    assert before + after == counted(new_state(), make_batches(poisoned)) == [1, 2, 3, 1]
    assert before and len(after) > 1


def test_without_clipping_gradients_stay_and_their_norm_is_the_same():
    torch.manual_seed(0)
    state = new_state()
    state.network(torch.randn(4, 3)).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in state.network.parameters()]
    norm = clip_gradients(state.optimizer, math.inf)
    assert all(
        torch.equal(parameter.grad, each) for parameter, each in zip(state.network.parameters(), gradients, strict=True)
    )
    torch.testing.assert_close(norm, torch.cat([each.flatten() for each in gradients]).norm())
    assert norm == clip_gradients(state.optimizer, float(norm) / 2)
    torch.testing.assert_close(clip_gradients(state.optimizer, math.inf), norm / 2)


@pytest.mark.parametrize("lag", LAGS)
def test_no_batch_is_drawn_beyond_the_last_step(lag):
    batches = iter(make_batches((2, 8)))
    state = run(new_state(), batches, [], verdict_lag=lag)
    assert (state.step, state.batches, len(list(batches))) == (STEPS, STEPS + 2, 4)


@pytest.mark.parametrize("lag", LAGS)
def test_all_batches_are_settled_where_they_end_before_the_last_step(lag):
    state = run(new_state(), make_batches((2,))[:7], [], verdict_lag=lag)
    assert (state.step, state.batches) == (6, 7)


def test_the_host_looks_ahead_of_a_gpu_only():
    assert default_verdict_lag(torch.device("cuda")) == 1
    assert default_verdict_lag(torch.device("cpu")) == 0


@pytest.mark.parametrize("weight", [1e-4, 0.3, 0.7, 1.0])
def test_a_halted_average_stays_as_it_is_to_the_bit(weight):
    network = Network()
    average = EMA(network, decay=1 - weight)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(3)
    average.update(network, 0, torch.ones(()))
    assert bits(average.state_dict()) == bits(before)
    going_on = copy.deepcopy(average)
    average.update(network, 0, torch.zeros(()))
    going_on.update(network, 0)
    assert bits(average.state_dict()) == bits(going_on.state_dict())
    assert not math.isclose(average.state_dict()["scale"], before["scale"])
