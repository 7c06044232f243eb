"""Grids for which the cluster has no room: they keep no checkpoint for long, and training ends without them."""

import time
from pathlib import Path

import pytest
from fakes import FakeRun
from tiny import tiny_recipe

from pipelines.training.monitoring import previews
from pipelines.training.monitoring.previews import Previews

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def waiting(tmp_path):
    """Grids of three steps, each of which needs a GPU that no node has, and the messages about them."""
    messages = []
    config = tiny_recipe(tmp_path, "evaluate.gpus_per_worker=1")
    grids = Previews(config, FakeRun(), messages.append)
    for step in (2, 4, 6):
        grids.start("no-such-checkpoint", step, "digest")
    return grids, messages


def test_a_grid_that_waited_too_long_gives_way_to_newer_ones(waiting, monkeypatch):
    grids, messages = waiting
    grids.collect()
    grids.cancel_waiting()
    assert grids.pending_steps == {2, 4, 6} and not messages
    monkeypatch.setattr(previews, "PATIENCE_SECONDS", 0.0)
    grids.cancel_waiting()
    assert grids.pending_steps == {6}
    assert [line.split(":")[0] for line in messages] == ["no samples of step 2", "no samples of step 4"]
    assert "leave no room" in messages[0]


def test_grids_that_are_not_drawn_in_the_end_are_given_up(waiting, monkeypatch):
    grids, messages = waiting
    monkeypatch.setattr(previews, "FINAL_WAIT_SECONDS", 0.0)
    grids.collect(wait=True)
    assert grids.pending_steps == set()
    assert messages == ["no samples of step 2, 4, 6 after 0 s: no longer waiting for them"]


def test_a_grid_that_is_being_drawn_is_waited_for(tmp_path, monkeypatch):
    def draw(checkpoint, config):  # in here it is pickled by value: workers cannot import this file
        yield None
        time.sleep(0.2)
        yield checkpoint.encode()

    messages, config = [], tiny_recipe(tmp_path)
    grids = Previews(config, FakeRun(), messages.append)
    monkeypatch.setattr(previews, "_draw_grid", draw)
    monkeypatch.setattr(previews, "PATIENCE_SECONDS", 0.0)
    grids.start("first", 2, "digest")
    while grids._waiting:
        grids.collect()
    grids.start("second", 4, "digest")
    grids.cancel_waiting()
    assert grids.pending_steps == {2, 4}
    grids.collect(wait=True)
    assert grids.pending_steps == set() and not messages
    drawn = {file.name: file.read_text() for file in Path(config.folder("samples")).iterdir()}
    assert drawn == {"step_0000002.png": "first", "step_0000004.png": "second"}
