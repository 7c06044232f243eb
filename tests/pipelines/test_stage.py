"""The surroundings of jobs: what was taken is given back, however entering them ends."""

import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import tiny_recipe

from pipelines.config.encode import EncodeConfig
from pipelines.stage import StageContext
from pipelines.tracking.tracker import Tracker


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
