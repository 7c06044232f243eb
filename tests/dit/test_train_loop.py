"""Micro-batches, skipped batches, and the position in the data."""

import pickle

import pytest
import torch
from torch import nn

from dit.schedule import TrainingConfig
from dit.train import NonFiniteError, create_state, train

GLOBAL_BATCH = 12


class Batch:
    """Inputs and targets that can be split into micro-batches."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def chunk(self, count):
        return [Batch(*parts) for parts in zip(self.inputs.chunk(count), self.targets.chunk(count), strict=True)]


def batches(count, poisoned=()):
    generator = torch.Generator().manual_seed(2)
    made = [Batch(*(torch.randn(GLOBAL_BATCH, n, generator=generator) for n in (3, 2))) for _ in range(count)]
    for index in poisoned:
        made[index].inputs[5, 1] = torch.nan
    return made


def share_of_mean(model, batch):
    """Return the contribution of a micro-batch to the mean over the global batch."""
    squares = (model(batch.inputs) - batch.targets).square().mean(1)
    return {"loss": squares.sum() / GLOBAL_BATCH}


def run(given, **settings):
    """Return the state after training, the reported losses, and the skipped batches."""
    config = TrainingConfig(steps=4, global_batch_size=GLOBAL_BATCH, learning_rate=0.05, log_every=1, **settings)
    torch.manual_seed(1)
    state = create_state(nn.Linear(3, 2), config)
    reports, left_out = [], []
    train(
        state,
        given,
        share_of_mean,
        config,
        report=lambda step, metrics: reports.append(metrics["loss"]),
        save=lambda state: None,
        on_nonfinite=lambda error, batch: left_out.append((error.step, batch)),
    )
    return state, reports, left_out


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_micro_batches_give_the_step_of_the_full_batch(parts):
    whole, losses, _ = run(batches(4))
    divided, same, _ = run(batches(4), accumulation_steps=parts)
    torch.testing.assert_close(divided.network.state_dict(), whole.network.state_dict(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(same, losses, rtol=1e-5, atol=0)


def test_skipping_a_poisoned_batch_equals_never_having_seen_it():
    given = batches(6, poisoned=[1, 2])
    state, losses, left_out = run(given)
    clean, same, none = run([given[0], *given[3:]])
    assert [(step, given.index(batch)) for step, batch in left_out] == [(1, 1), (1, 2)]
    assert not none
    assert losses == same
    for name, value in clean.network.state_dict().items():
        assert torch.equal(state.network.state_dict()[name], value)
        assert torch.equal(state.ema.state_dict()[name], clean.ema.state_dict()[name])


def test_skipped_batches_count_in_the_position_of_the_data():
    state, _, _ = run(batches(6, poisoned=[1, 2]))
    assert (state.step, state.batches) == (4, 6)


def test_gradients_of_a_skipped_batch_do_not_reach_the_next(recwarn):
    given = batches(2, poisoned=[0])
    state, _, _ = run(given, accumulation_steps=3)
    clean, _, _ = run(given[1:], accumulation_steps=3)
    assert torch.equal(state.network.weight, clean.network.weight)


def test_the_error_survives_pickling():
    error = NonFiniteError(7, float("nan"), float("inf"), 1e-4)
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.grad_norm, again.lr, str(again)) == (7, float("inf"), 1e-4, str(error))
    assert "step 8: loss nan, gradient norm inf, learning rate 1.0e-04" in str(error)
