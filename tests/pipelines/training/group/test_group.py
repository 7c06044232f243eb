"""How a training group treats the errors of its workers, without Ray."""

import pickle
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.training import TrainConfig
from pipelines.training.group import run_workers as group
from pipelines.training.group.run_workers import _died_repeatedly, _first_cause, _is_retryable
from raydit.errors import Diverged, Failed, InvalidInput, StorageFull, Unreachable, WorkersDied

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


def test_an_error_for_the_user_that_a_worker_raised_while_the_group_formed_is_not_retried():
    raised = Failed("found no GPU", "one", "set gpus_per_worker = 0")
    arrived = pickle.loads(pickle.dumps(ControllerError(RayTaskError("join", "a traceback", raised))))
    failure = _first_cause(arrived)
    assert type(failure) is Failed and str(failure) == str(raised)
    lost = ControllerError(RayTaskError("join", "a traceback", OSError("refused")))
    assert _is_retryable(_first_cause(lost))


@pytest.mark.parametrize(
    ("workers", "advice"),
    [
        (TrainConfig(), "Raise train.accumulation_steps, or set train.gradient_checkpointing = true"),
        (AutoencoderTrainConfig(), "Raise autoencoder.train.accumulation_steps"),
    ],
)
def test_a_worker_whose_memory_is_full_says_which_settings_take_less(monkeypatch, workers, advice):
    def train(worker, settings):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 is full. And more")

    monkeypatch.setattr("ray.get", lambda work: work)
    monkeypatch.setattr(group, "Worker", SimpleNamespace(of_ray_train=lambda workers, mailbox: None))
    with pytest.raises(Failed) as raised:
        group._run_worker({"work": (train, None, workers, None)})
    assert str(raised.value).startswith(f"CUDA out of memory. Tried to allocate 2 GiB. GPU 0 is full. {advice} (")
    assert not _is_retryable(raised.value)


def test_a_worker_without_a_compiler_ends_before_it_reads_anything(monkeypatch):
    monkeypatch.setattr("raydit.compilers.find_compiler", lambda gpu: None)
    monkeypatch.setattr("ray.get", lambda work: work)
    monkeypatch.setattr(group, "Worker", SimpleNamespace(of_ray_train=lambda workers, mailbox: None))
    called = []
    for workers in (TrainConfig(compile=True), AutoencoderTrainConfig(compile=True)):
        with pytest.raises(Failed, match=r"compile = true, and no C\+\+ compiler") as raised:
            group._run_worker({"work": (called.append, None, workers, None)})
        assert not called and not _is_retryable(raised.value)
