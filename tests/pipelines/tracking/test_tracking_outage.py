"""A tracking server that goes and comes back in the middle of a training."""

import sqlite3
import threading
import time
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer, free_port, wait_until
from tiny_training import training_recipe

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.recipe import TrackingConfig
from pipelines.stage import StageContext
from pipelines.tracking.store import check_tracking
from pipelines.tracking.tracker import Tracker
from pipelines.train import train

STEPS, EVERY = 2500, 5
MODEL = {"patch_size": 1, "hidden_size": 96, "depth": 6, "num_heads": 4}
"""Large enough for a training that goes on while the server is away."""
AWAY_SECONDS = 20


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_is_told_everything_in_order(local_ray, tmp_path):
    database = tmp_path / "mlflow.db"
    store = f"sqlite:///{database}"
    check_tracking(store)  # makes the database
    server = MlflowServer(store, free_port(), tmp_path)
    recipe = training_recipe(
        tmp_path, model=MODEL, steps=STEPS, checkpoint_every=50, keep_last=2, log_every=EVERY, num_workers=1
    )
    recipe = replace(recipe, tracking=TrackingConfig(uri=server.uri))
    thread = threading.Thread(target=train_in, args=(recipe,), daemon=True)
    with server:
        server.wait()
        thread.start()
        wait_until(lambda: len(losses(database)) > 10)
    told, reached = losses(database), newest(recipe)
    time.sleep(AWAY_SECONDS)
    assert newest(recipe) > reached  # training does not wait for it
    assert losses(database) == told and status(store, recipe) == "RUNNING"
    with server:
        thread.join()
        deliver(recipe)
    steps = [step for step, _ in losses(database)]
    assert len(told) < len(steps) and steps == list(range(EVERY, STEPS + 1, EVERY))
    assert status(store, recipe) == "FINISHED"


def train_in(recipe) -> None:
    with StageContext(recipe) as context:
        train(recipe, context=context)


def deliver(recipe) -> None:
    """What a busy machine has not delivered when the command ended, the next one does."""
    tracker = Tracker.open(recipe)
    wait_until(lambda: not tracker._journal.undelivered)
    tracker.close()


def newest(recipe) -> int:
    return CheckpointFolder(recipe.folder("checkpoints")).last_step()


def losses(database) -> list[tuple[int, float]]:
    """Steps and losses in the order in which the store has taken them."""
    with sqlite3.connect(database) as connection:
        query = "SELECT step, value FROM metrics WHERE key = 'train/loss' ORDER BY rowid"
        return connection.execute(query).fetchall()


def status(store, recipe) -> str:
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name(recipe.name).experiment_id])
    return run.info.status
