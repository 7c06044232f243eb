"""How a training group treats the errors of its workers, without Ray."""

import pickle

import pytest
from fakes import FakeContext
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines.training.group.failures import MAX_RESTARTS, Restarts, died_repeatedly, first_cause, is_retryable
from raydit.errors import Diverged, Failed, InvalidInput, StorageFull, Unreachable, WorkersDied

DEAD = WorkerHealthCheckFailedError("a worker failed its health check", RuntimeError("it was killed"))
LOST_PEER = RuntimeError("connection closed by peer")


@pytest.mark.parametrize("kind", [InvalidInput, Diverged, StorageFull, Unreachable, WorkersDied])
def test_an_error_for_the_user_reaches_the_driver_as_it_was_and_is_not_retried(kind):
    raised = kind("train.loading: found 'memory'", "'stream'", "set train.loading")
    arrived = pickle.loads(pickle.dumps(WorkerGroupError("all", {0: LOST_PEER, 1: raised, 2: DEAD})))
    failure = first_cause(arrived)
    assert type(failure) is kind and str(failure) == str(raised)
    assert not is_retryable(failure)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), FloatingPointError("x")])
def test_an_error_that_would_recur_is_not_retried(error):
    assert not is_retryable(error)


def test_a_dead_worker_is_retried_and_in_the_end_reported_in_one_line():
    assert is_retryable(DEAD) and is_retryable(LOST_PEER)
    reported = died_repeatedly("train", DEAD)
    assert isinstance(reported, WorkersDied)
    assert str(reported).startswith("train: workers died 4 times without a new checkpoint in between")
    assert "\n" not in str(reported)


def test_a_bug_that_recurs_is_raised_as_it_is():
    assert died_repeatedly("train", LOST_PEER) is LOST_PEER


def test_an_error_for_the_user_that_a_worker_raised_while_the_group_formed_is_not_retried():
    raised = Failed("found no GPU", "one", "set gpus_per_worker = 0")
    arrived = pickle.loads(pickle.dumps(ControllerError(RayTaskError("join", "a traceback", raised))))
    failure = first_cause(arrived)
    assert type(failure) is Failed and str(failure) == str(raised)
    lost = ControllerError(RayTaskError("join", "a traceback", OSError("refused")))
    assert is_retryable(first_cause(lost))


def test_a_group_restarts_a_few_times_after_each_checkpoint():
    restarts, error = Restarts(FakeContext(), "train"), WorkerGroupError("all", {0: DEAD})
    for _ in range(2):
        restarts.on_checkpoint()
        for _ in range(MAX_RESTARTS):
            restarts.restart_or_raise(DEAD, error)
    with pytest.raises(WorkersDied, match="workers died 4 times") as raised:
        restarts.restart_or_raise(DEAD, error)
    assert raised.value.__cause__ is error


def test_an_error_that_would_recur_is_raised_instead_of_a_restart():
    failure, error = InvalidInput("found a", "b", "do c"), RuntimeError("a group failed")
    with pytest.raises(InvalidInput) as raised:
        Restarts(FakeContext(), "train").restart_or_raise(failure, error)
    assert raised.value is failure and failure.__cause__ is error
