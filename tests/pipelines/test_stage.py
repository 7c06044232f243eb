"""The surroundings of jobs: what was taken is given back, however entering them ends."""

import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import tiny_recipe

from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import TrainConfig, require_own_gpus
from pipelines.stage import StageContext
from pipelines.tracking.tracker import Tracker
from raydit.errors import InvalidInput


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_context_that_is_interrupted_at_its_start_holds_nothing(tmp_path, monkeypatch, error):
    """In the delivery of what waits, when it has taken the folder and the signals."""
    held = []

    def interrupt(config, part):
        held.extend(Path(config.output).iterdir())
        raise error

    monkeypatch.setattr(Tracker, "has_waiting", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error), StageContext(tiny_recipe(tmp_path)):
        pass
    assert [path.name for path in held] == [".lease.json"] and not held[0].exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("address", "said"), [("10.0.0.1:6379", True), ("local", False)])
def test_a_cluster_without_room_is_named(tmp_path, monkeypatch, capsys, address, said):
    monkeypatch.setattr("cluster.session.ray_session", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr("cluster.session.require_resources", lambda *arguments, **options: None)
    monkeypatch.setattr("cluster.session.count_free_workers", lambda *arguments, **options: 1.0)
    context = StageContext(tiny_recipe(tmp_path), address=address)
    for _ in range(2):
        context.start_ray(EncodeConfig(num_workers=4), "encode")
    out = capsys.readouterr().out
    assert out.count("encode       the cluster has room for 1 of 4 workers now; waiting for more") == said
    context.start_ray(EncodeConfig(num_workers=1), "train")
    assert "has room" not in capsys.readouterr().out


def test_a_stage_that_compiles_asks_once_for_a_compiler_before_it_works(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(StageContext, "start_ray", lambda *arguments: None)
    monkeypatch.setattr(StageContext, "tracker", None)
    monkeypatch.setattr("cluster.session.require_compilers", lambda num_workers, needs: asked.append(num_workers))
    context = StageContext(tiny_recipe(tmp_path))
    for compiled in (False, True, True):
        context.prepare_work(TrainConfig(num_workers=3, global_batch_size=6, compile=compiled), "train")
    context.prepare_work(EncodeConfig(num_workers=2), "encode")
    assert asked == [3]


def training(kind, workers, gpus):
    return kind(num_workers=workers, gpus_per_worker=gpus, global_batch_size=8)


@pytest.mark.parametrize(
    ("kind", "stage", "section"),
    [(TrainConfig, "train", "train"), (AutoencoderTrainConfig, "autoencoder", "autoencoder.train")],
)
def test_workers_of_a_training_that_would_share_a_gpu_are_refused_before_any_work(tmp_path, kind, stage, section):
    context = StageContext(tiny_recipe(tmp_path))
    message = f"{section}.gpus_per_worker: found 0.5 for each of 2 workers, .* set {section}.gpus_per_worker = 1"
    with pytest.raises(InvalidInput, match=f"(?i){message}"):
        context.prepare_work(training(kind, 2, 0.5), stage)
    for workers, gpus in ((1, 0.5), (2, 1), (2, 0)):
        require_own_gpus(training(kind, workers, gpus), section)


def test_workers_that_do_not_train_may_share_a_gpu():
    require_own_gpus(EvaluateConfig(num_workers=2, gpus_per_worker=0.5), "evaluate")
