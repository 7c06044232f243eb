"""How a training group treats the errors of its workers, without Ray."""

import pickle

import pytest
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines.training.group import _died_repeatedly, _first_cause, _is_retryable
from raydit.errors import Diverged, InvalidInput, StorageFull, Unreachable, WorkersDied

DEAD = WorkerHealthCheckFailedError("a worker failed its health check", RuntimeError("it was killed"))
LOST_PEER = RuntimeError("connection closed by peer")


@pytest.mark.parametrize("kind", [InvalidInput, Diverged, StorageFull, Unreachable, WorkersDied])
def test_an_error_for_the_user_reaches_the_driver_as_it_was_and_is_not_retried(kind):
    raised = kind("train.loading: found 'memory'", "'stream'", "set train.loading")
    arrived = pickle.loads(pickle.dumps(WorkerGroupError("all", {0: LOST_PEER, 1: raised, 2: DEAD})))
    failure = _first_cause(arrived)
    assert type(failure) is kind and str(failure) == str(raised)
    assert not _is_retryable(failure)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), FloatingPointError("x")])
def test_an_error_that_would_recur_is_not_retried(error):
    assert not _is_retryable(error)


def test_a_dead_worker_is_retried_and_in_the_end_reported_in_one_line():
    assert _is_retryable(DEAD) and _is_retryable(LOST_PEER)
    reported = _died_repeatedly("train", DEAD)
    assert isinstance(reported, WorkersDied)
    assert str(reported).startswith("train: workers died 4 times without a new checkpoint in between")
    assert "\n" not in str(reported)


def test_a_bug_that_recurs_is_raised_as_it_is():
    assert _died_repeatedly("train", LOST_PEER) is LOST_PEER
