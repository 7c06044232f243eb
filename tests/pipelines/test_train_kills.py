"""Killing workers, driver, raylet or a node during training changes no bit of the result."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import processes_below
from tiny_training import assert_equal, final_weights, training_recipe, write_held_out

from pipelines.checkpoints.folder import CheckpointFolder

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 1200, 20
MODEL = {"patch_size": 1, "hidden_size": 96, "depth": 6, "num_heads": 4}
"""Large enough for some seconds of training, in which processes can be killed."""

pytestmark = pytest.mark.slow


class TrainingFolder:
    """A folder with finished latents, in which the train job runs."""

    def __init__(self, folder: Path, random: str | None = "counter", **train):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        settings = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 5, "num_workers": 2, **train}
        # Half of the validations are between checkpoints.
        self.recipe = training_recipe(folder, model=MODEL, random=random, validate_every=EVERY // 2, **settings)
        if not (folder / "output" / "latents_held_out").exists():
            write_held_out(self.recipe, 20)
        self.checkpoints = CheckpointFolder(self.recipe.folder("checkpoints"))

    def start(self, address: str = "", before: str = "") -> subprocess.Popen:
        """Start the train job in a process of its own. before: code that runs first in it."""
        content = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name != "encode"}
        script = before + (
            "import json, sys\n"
            "from pipelines.config.reader import validate_recipe\n"
            "from pipelines.stage import StageContext\n"
            "from pipelines.train import train\n"
            "config = validate_recipe(json.loads(sys.argv[1]))\n"
            "with StageContext(config, address=sys.argv[2] or None) as context:\n"
            "    train(config, context=context)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(content), address],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=open(self.folder / "log", "a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def wait_for(self, step: int, process: subprocess.Popen) -> None:
        """Wait for the checkpoint of this step or a later one."""
        while self.newest() < step:
            assert process.poll() is None, self.log()
            time.sleep(0.01)

    def newest(self) -> int:
        return self.checkpoints.last_step()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self, process: subprocess.Popen) -> None:
        assert process.wait(timeout=600) == 0, self.log()

    def models(self) -> list[int]:
        """Return the steps of the checkpoints that the store has as models."""
        from mlflow import MlflowClient

        client = MlflowClient(self.recipe.tracking.uri)
        experiment = client.get_experiment_by_name(self.recipe.name)
        names = [model.name for model in client.search_logged_models([experiment.experiment_id])]
        return [int(name.rpartition("_")[2]) for name in names]

    def losses(self, rel: float = 0.0, metric: str = "train/loss") -> dict[int, float]:
        """Return the losses in the store by step; several values of one step must agree within `rel`."""
        from mlflow import MlflowClient

        client = MlflowClient(self.recipe.tracking.uri)
        experiment = client.get_experiment_by_name(self.recipe.name)
        losses: dict[int, set[float]] = {}
        for run in client.search_runs([experiment.experiment_id]):
            for point in client.get_metric_history(run.info.run_id, metric):
                losses.setdefault(point.step, set()).add(point.value)
        assert all(max(values) - min(values) <= rel * max(values) for values in losses.values()), losses
        return {step: max(values) for step, values in sorted(losses.items())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return finished_unbroken(TrainingFolder(tmp_path_factory.mktemp("unbroken")))


def finished_unbroken(training):
    """Return the weights, the losses and the validation losses of a training that nothing cuts off."""
    training.finish(training.start())
    return final_weights(training.recipe), training.losses(), training.losses(metric="validation/loss")


def assert_unbroken(training, unbroken):
    weights, losses, validation = unbroken
    assert_equal(final_weights(training.recipe), weights)
    assert training.losses() == losses
    assert list(validation) == list(range(EVERY // 2, STEPS + 1, EVERY // 2))
    assert training.losses(metric="validation/loss") == validation


def test_killed_drivers_and_workers_at_ten_random_points_change_nothing(tmp_path, unbroken):
    """The running command replaces a worker; a killed driver's command is run again."""
    training, points = TrainingFolder(tmp_path), random.Random(2)
    process = training.start()
    for victim in ["worker", "driver"] * 5:
        training.wait_for(training.newest() + 1, process)
        time.sleep(points.random() * 0.3)
        if victim == "driver":
            process.kill()
            process.wait()
            process = training.start()
        else:
            # Those of a killed driver may have written the checkpoint that was waited for.
            while not (workers := processes_below(process.pid, "RayTrainWorker")):
                assert process.poll() is None, training.log()
                time.sleep(0.1)
            os.kill(points.choice(workers), signal.SIGKILL)
    training.finish(process)
    assert_unbroken(training, unbroken)


def test_ctrl_c_and_a_killed_raylet_change_nothing(tmp_path, unbroken):
    training = TrainingFolder(tmp_path)
    process = training.start()
    training.wait_for(EVERY, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    process = training.start()
    training.wait_for(training.newest() + 1, process)
    (raylet,) = processes_below(process.pid, "raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    assert process.wait(timeout=300) != 0, training.log()
    training.finish(training.start())
    assert_unbroken(training, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_loses_no_step(tmp_path, unbroken, number):
    """Two workers stop after the same step, between two regular checkpoints, and go on from there to the bit."""
    training = TrainingFolder(tmp_path, checkpoint_every=500)
    for stops in (1, 2):
        process = training.start()
        while training.log().count("steps | loss") < stops:
            assert process.poll() is None, training.log()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=120) != 0
        (step,) = training.checkpoints.interrupted_steps()
        assert f"stopped after step {step}" in training.log().replace(",", "")
        assert set(training.models()) == set(training.checkpoints.finished_steps())
    training.finish(training.start())
    assert training.checkpoints.interrupted_steps() == [] and training.checkpoints.finished_steps()[-1] == STEPS
    assert_unbroken(training, unbroken)


def test_lost_messages_are_logged_by_the_next_run(tmp_path, unbroken):
    """The mailbox dies: the workers finish, the command fails, and the next one logs the missing reports."""
    training = TrainingFolder(tmp_path)
    process = training.start()
    training.wait_for(EVERY, process)
    (mailbox,) = processes_below(process.pid, "ray::Mailbox")
    os.kill(mailbox, signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    assert "reports did not reach tracking" in training.log()
    training.finish(training.start())
    assert_unbroken(training, unbroken)


def test_a_lost_node_changes_nothing(tmp_path, unbroken, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        training = TrainingFolder(tmp_path)
        process = training.start(cluster.address)
        training.wait_for(2 * EVERY, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        training.finish(process)
    finally:
        cluster.shutdown()
    assert_unbroken(training, unbroken)


def test_training_continues_with_fewer_workers_and_grows_again(tmp_path, monkeypatch):
    """Every step sees the same images, whatever the number of workers, so that results agree to rounding.

    With draws by generators: of some seeds and draws, this model amplifies rounding from 1e-7 to 1e-2 in 300 steps, and
    these are others.
    """
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        elastic = {"num_workers": [1, 2], "steps": 3 * STEPS, "checkpoint_every": 100, "keep_last": 2}
        training = TrainingFolder(tmp_path / "elastic", random=None, **elastic)
        often = "import pipelines.training.group\npipelines.training.group.RESIZE_SECONDS = 2.0\n"
        process = training.start(cluster.address, before=often)
        training.wait_for(100, process)
        cluster.remove_node(node, allow_graceful=False)
        training.wait_for(training.newest() + 300, process)
        cluster.add_node(num_cpus=1)
        training.finish(process)
    finally:
        cluster.shutdown()
    numbers = re.findall(r"(\d+) of at most 2 workers", training.log())
    assert training.newest() == 3 * STEPS
    assert numbers[0] == numbers[-1] == "2" and "1" in numbers, training.log()
    losses = {step: loss for step, loss in training.losses(rel=1e-5).items() if step <= STEPS}
    _, expected, _ = finished_unbroken(TrainingFolder(tmp_path / "unbroken", random=None))
    assert losses == pytest.approx(expected, rel=1e-5)
