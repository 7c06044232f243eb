"""The surroundings of jobs: what was taken is given back, however entering them ends."""

import signal
from pathlib import Path

import pytest
from tiny import tiny_recipe

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
