"""The surroundings of jobs: what was taken is given back, however entering them ends."""

import errno
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import tiny_recipe

from cluster.storage import lease
from pipelines.artifacts import Artifact
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import TrainConfig, require_own_gpus
from pipelines.stage import StageContext
from pipelines.tracking.tracker import Tracker
from raydit.errors import InvalidInput, StorageFailed


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


@pytest.fixture(params=[errno.EROFS, errno.EACCES, errno.EPERM])
def refuse_writes(request, monkeypatch):
    """Let the system refuse every new lease, as on a disk that is read-only or belongs to another user."""

    def refuse(path, *others):
        raise OSError(request.param, os.strerror(request.param), path)

    monkeypatch.setattr(lease, "_replace", refuse)
    return os.strerror(request.param)


def test_an_output_that_cannot_be_written_is_refused_once_there_is_work(tmp_path, refuse_writes):
    config = tiny_recipe(tmp_path)
    output = Path(config.output)
    output.mkdir()
    works = {
        "prepare_work": lambda context: context.prepare_work(config.train, "train"),
        "start_ray": lambda context: context.start_ray(config.train, "train"),
        "run": lambda context: context.run("train", {}).__enter__(),
        "tracker": lambda context: context.tracker,
    }
    for work in works.values():
        with StageContext(config) as context:
            assert not context.is_writable and context.tracking_uri == config.tracking.uri
            with pytest.raises(StorageFailed) as refused:
                work(context)
        assert str(refused.value) == (
            f"{output} cannot be written ({refuse_writes}), expected a folder that can be written, because not all "
            "that was asked for is finished. Give yourself permission to write there, or choose another folder"
        )
    assert list(output.iterdir()) == []


def test_a_missing_output_that_cannot_be_written_is_refused_at_once(tmp_path, refuse_writes):
    """Nothing can be finished in it."""
    with pytest.raises(StorageFailed, match="output cannot be written"), StageContext(tiny_recipe(tmp_path)):
        pass


def test_a_refused_write_of_a_stage_is_said_in_the_same_words(tmp_path, monkeypatch, refuse_writes):
    config = tiny_recipe(tmp_path)
    folder = Path(config.folder("checkpoints"))
    folder.mkdir(parents=True)

    def refuse(path, *others):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("cluster.storage.write_json_atomically", refuse)
    with pytest.raises(StorageFailed, match="output cannot be written"), StageContext(config):
        Artifact("train", str(folder), {"a": 1}).prepare()
    with pytest.raises(PermissionError), StageContext(config):
        refuse(str(tmp_path / "mlflow.db"))
