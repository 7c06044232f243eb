"""What a worker of a group does before and around its training function, without Ray."""

from types import SimpleNamespace

import pytest

from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.training import TrainConfig
from pipelines.training.group import run_workers as group
from pipelines.training.group.failures import is_retryable
from raydit.errors import Failed


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
    assert not is_retryable(raised.value)


def test_a_worker_without_a_compiler_ends_before_it_reads_anything(monkeypatch):
    monkeypatch.setattr("raydit.compilers.find_compiler", lambda gpu: None)
    monkeypatch.setattr("ray.get", lambda work: work)
    monkeypatch.setattr(group, "Worker", SimpleNamespace(of_ray_train=lambda workers, mailbox: None))
    called = []
    for workers in (TrainConfig(compile=True), AutoencoderTrainConfig(compile=True)):
        with pytest.raises(Failed, match=r"compile = true, and no C\+\+ compiler") as raised:
            group._run_worker({"work": (called.append, None, workers, None)})
        assert not called and not is_retryable(raised.value)
